"""Where the bytes of shard sets come from: folders, servers, object storage, commands, and a cache on the node."""
