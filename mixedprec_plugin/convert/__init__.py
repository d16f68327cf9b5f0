"""Writing a plan's virtual checkpoint to disk, for later or for servers without the plugin.

form         what is written of each layer, and what config.json says of it
compressed   the same as compressed-tensors, which stock SGLang and vLLM load
parts        which tensor lies where in which file, planned from headers
folder       the output folder: what is in it, and how the finished files get there
provenance   where every layer came from
inputs       what a conversion is made of, so that only the same one is continued
journal      the parts that are finished
writing      one file, a layer in memory at a time
converter    all of it: plan -> folder
"""
