"""Write image datasets as tar shards that vitscale, webdataset, wids and NVIDIA DALI all open.

The format is specified in shards/README.md. The way of an image: ``sources`` names and reads it, ``planning`` says in
which shard it goes, ``writing`` puts it there, ``checking`` finds what is wrong with it later.
"""
