"""NVFP4 in SGLang: `cuda` cures SGLang's faults, `cpu` is Marlin's arithmetic in torch."""

from mixedprec_plugin.methods.nvfp4.sglang.cuda import UNSUMMED_EXPERTS as UNSUMMED_EXPERTS
from mixedprec_plugin.methods.nvfp4.sglang.cuda import repaired as repaired
