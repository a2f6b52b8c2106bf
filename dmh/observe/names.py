"""The names of everything that dmh counts, in the order of their cells in shared memory.

Pure.  The build of the native module generates the C constants from these lists, so a counter has one name everywhere:
``faults`` here, ``DMH_C_FAULTS`` in C, ``faults`` in `Region.stats()` and ``dmh stats``.
"""

from __future__ import annotations

COUNTERS: dict[str, str] = {
    "messages": "page-fault messages read from userfaultfd descriptors",
    "duplicates": "messages dropped because the page was already on its way to a resolver",
    "dropped": "messages dropped because the page was being fetched or evicted; whoever ends that wakes",
    "woken": "messages answered by a wake alone: another thread or process had brought the page in",
    "faults": "pages asked for by a fault and resolved",
    "inline": "of the faults, those that the monitor resolved where it stands",
    "zero": "of the faults, new pages: zero-filled without a request to the store",
    "soft": "of the faults, pages taken back from the victim buffer",
    "hard": "of the faults, pages fetched from the store",
    "prefetched": "pages brought in ahead of a fault",
    "prefetched_new": "of the prefetched, new pages",
    "fetched_bytes": "bytes read from the store",
    "fetch_calls": "batched requests to the store for reading",
    "room_waits": "faults that found no room and waited for an eviction",
    "rings": "times LPET was rung",
    "runs": "times LPET ran from the high to the low threshold",
    "evicted": "pages moved out of the region",
    "marked": "pages marked to see whether they are used (idle source buffer: moved to the victim buffer, evicted)",
    "found_used": "of the marked, pages that were used before they were looked at again",
    "mark_us": "processor time that marks and looks have taken, in us",
    "clean": "of the evicted, pages dropped because the store has the same bytes",
    "zeroed": "of the evicted, pages dropped because they are all zeros",
    "dropped_clean": "of the evicted, pages dropped unseen: nobody can have written to them since they came in",
    "written": "pages written to the store and acknowledged",
    "written_bytes": "bytes written to the store",
    "write_calls": "batched requests to the store for writing",
    "taken_back": "pages that were touched again while they were being written",
    "discarded": "pages whose content was given up by the program",
    "deleted": "pages deleted from the store",
    "store_retries": "requests to the store that were tried again",
    "poisoned": "pages whose content was lost or failed its checksum: access raises SIGBUS",
    "intruded": "pages that something outside dmh had instantiated in the region, removed before installing",
    "restarts": "worker processes that took the place of dead ones",
    "refused": "messages on dmh's own sockets that were malformed and ignored",
    "moves": "times the fault path followed the faulting thread to another processor",
    "kept": "times the other of two processors was kept from being idle, because the faulting thread was moved there",
    "late": "messages for a page that was on its way ahead of use: asked for before it was delivered",
    "ahead_used": "pages of read-ahead windows that a scan has passed, by its next fault",
    "ahead_wasted": "pages of read-ahead windows whose scan did not go on",
    "withheld": "pages that raise SIGBUS because the store did not answer in time, until it does",
    "healed": "of the withheld, pages that can be used again",
}
"""Counter name -> what it counts."""

CELLS: dict[str, int] = {name: cell for cell, name in enumerate(COUNTERS)}
"""Counter name -> its cell in each worker's row."""
