"""Simulation: the policies of `dmh.evict.policies` over traces of page numbers, beside LRU and OPT."""
