"""The steps of a fault and of an eviction at which a worker may be stopped for good, by name.  Pure.

Tests park a worker at one of them and kill it there, so that each moment at which a worker can die is a moment that
was tried.  The build of the native module generates the C constants from this list.  At run time a step costs one
load of a word that nobody writes.
"""

from __future__ import annotations

STEPS: dict[str, str] = {
    "reserved": "room is taken for a fault, no page is claimed yet",
    "claimed": "pages are FETCHING, nothing was asked of the DMS",
    "fetched": "the DMS has answered; nothing is installed",
    "copied": "a run is in the region's memory, its pages are still FETCHING",
    "copied_partly": "the first kernel page of a larger page is in the region's memory, the rest is not",
    "published": "the first page of a run is RESIDENT, its slot not yet free, nobody woken",
    "slots_taken": "slots are set aside for pages that are still RESIDENT",
    "evicting": "a group of pages is EVICTING, the journal does not know it yet",
    "journaled": "the journal names the group, nothing has moved",
    "spliced": "the pipe holds references to pages that are still in the region",
    "punched_partly": "the pipe is the only holder of the group's first neighbours, the others are still in the region",
    "punched": "the pipe is the only holder of the group",
    "read_partly": "one kernel page of the group is in its slot, the rest in the pipe",
    "read": "the group is in its slots, its pages are still EVICTING",
    "staged": "the first page of the group is STAGED, the others are not yet",
    "released": "the group is STAGED, nobody woken",
    "settled": "what is clean or zero is done with, the rest about to be written",
    "put": "the DMS has acknowledged a batch, the table does not say so",
    "summed": "the table has a page's new hash, the page is not yet STORED",
    "acknowledged": "the first page of a batch is STORED, its slot not yet free",
    "discarding": "pages that are being given up are out of the region, and still EVICTING",
    "dropping": "pages that nobody can have written to are EVICTING, and still in the region",
    "let_go": "such pages are out of the region, and still EVICTING",
    "marking": "the first program's mapping of a page has the mark that raises SIGBUS, the others do not",
    "healing": "a page's content is in the region again and the first program's mapping healed, the others are not",
}
"""Step name -> what has just happened."""

NUMBERS: dict[str, int] = {name: number for number, name in enumerate(STEPS)}
"""Step name -> its number in C."""
