"""Write image datasets as tar shards that vitscale, webdataset, wids and NVIDIA DALI all open.

The format is specified in shards/README.md. The way of an image: ``sources`` names and reads it, ``plan``
says in which shard it goes, ``writer`` puts it there.
"""
