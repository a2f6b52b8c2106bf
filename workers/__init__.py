"""dmh's worker processes: each module is the whole story of one process, told with the parts in `dmh`."""
