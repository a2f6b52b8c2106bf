"""What this machine gives: kernel features by probe, memory and its bounds, this process's limits.

Facts only, looked up at the moment of the call; what dmh needs of them is `dmh.service.requirements`, how they are
told to people is `dmh.doctor`.
"""
