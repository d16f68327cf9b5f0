"""SGLang in CUDA mode without a GPU: what each card would run, layer by layer.

cards.py        the cards that are played
libcuda.c       the driver's symbols that imports look for; driver.py compiles and loads it
played_cuda.py  torch.cuda answers as the card would
fake_device.py  CUDA tensors without memory, and what is written into them
journal.py      what was reached: kernels, writes, answers that were made up
recorders.py    SGLang's JIT modules, custom operators and Triton launches write into the journal
ptx.py          Triton kernels are really compiled for the card
marlin_checks.py  what the hosts of Marlin's kernels check
stand_ins.py    results of what fake tensors cannot pass through
rank.py         SGLang's context of one tensor-parallel rank, without processes
methods.py      the methods that are tried
layers.py       the layer kinds: shapes, checkpoints, SGLang's modules
cells.py        one method in one layer kind: plan, build, load, process, forward
experts.py      layers of experts, each method alone and several in one
again.py        new weights for what was loaded: taken whole, or refused
whole.py        a whole model through the loader, as far as its last hidden states
attention.py    stands in for norms and attention
llama.py        a Llama, every method in one model
families.py     models with experts, and the mixes of methods that they run in; moe_models.py
process.py      all of it for one card, in a process of its own
matrix.py       all cards: `make dryrun`; tables.py prints them
conftest.py     the results of each card, made once for all tests
expected.py     what SGLang's sources say that each cell is
faults.py       deliberate faults, which no cell may survive; stock.py SGLang's own
auto.py         layers as other tools store them
prediction.py   the plan's bytes against what the layers hold
arguments.py    what SGLang makes of a server's arguments
"""
