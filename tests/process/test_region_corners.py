"""Where `Region` is easily wrong: odd arguments, ends in odd places, promises that hold only by a hair, lost pages."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from regions import inside, launcher_of, page_of, pattern, run_python, settings, start_python, wait_until

import dmh
from dmh.errors import RegionError
from dmh.lspt.states import Copy, State

OpenRegion = Callable[..., dmh.Region]


class TestArguments:
    def test_numpys_integers_are_integers(self, open_region: OpenRegion) -> None:
        """Shapes and offsets are often computed with NumPy, and numpy.empty takes them."""
        region = open_region()
        assert region.empty(np.int64(5)).shape == (5,)
        assert region.zeros(np.array([2, 3])).shape == (2, 3)
        assert region.ndarray(np.int64(4), "u1", np.int64(4096)).shape == (4,)

    def test_no_dimensions_and_no_elements(self, open_region: OpenRegion) -> None:
        region = open_region()
        single = region.zeros((), "i8")
        single[...] = 4
        assert single == 4
        assert region.zeros((3, 0, 2)).shape == (3, 0, 2)
        assert region.empty(0).shape == (0,)

    def test_a_type_that_is_an_array(self, open_region: OpenRegion) -> None:
        array = open_region().zeros((4,), np.dtype(("f8", (3,))))
        assert array.shape == np.zeros((4,), np.dtype(("f8", (3,)))).shape

    @pytest.mark.parametrize("shape", [(-2, -3), (-1,), -1])
    def test_a_negative_dimension_is_refused_and_takes_no_pages(self, open_region: OpenRegion, shape: object) -> None:
        region = open_region()
        for make in (region.empty, region.ndarray):
            with pytest.raises(RegionError):
                make(shape, "u1")
        assert region.stats().allocated == 0

    @pytest.mark.parametrize(("offset", "size"), [(-1, 1), (1 << 22, 1), ((1 << 22) - 3, 4), (1 << 70, 1)])
    def test_a_place_outside_is_refused(self, open_region: OpenRegion, offset: int, size: int) -> None:
        region = open_region()
        with pytest.raises(RegionError, match="not all within"):
            region.ndarray(size, "u1", offset)

    def test_arrays_of_elsewhere_are_refused_everywhere(self, open_region: OpenRegion) -> None:
        region, stranger = open_region(), np.zeros(9000)
        for use in (
            region.flush,
            region.evict,
            region.prefetch,
            region.discard,
            region.offset_of,
            lambda a: region.pin(a).__enter__(),
        ):
            with pytest.raises(RegionError, match="does not lie in the region"):
                use(stranger)

    def test_what_was_placed_is_not_handed_out_again(self, open_region: OpenRegion) -> None:
        region = open_region()
        placed = region.ndarray(5000, "u1", 8000)  # pages 1 to 3
        placed[:] = 1
        others = [region.empty(4096, "u1") for _ in range(region.size // 4096 - 3)]
        assert not any(np.shares_memory(placed, other) for other in others)
        with pytest.raises(RegionError, match="no room"):
            region.empty(1, "u1")


class TestAfterTheEnd:
    def test_discard_of_a_closed_region_is_an_error_and_no_crash(self) -> None:
        """Its unaligned edges are written by hand, which must not happen on a mapping that is gone."""
        code = """
            import sys, dmh
            from regions import settings
            region = dmh.open(settings())
            array = region.zeros(3000, "u1")
            region.close()
            try:
                region.discard(array[1:])
            except dmh.RegionError as error:
                print(error)
            """
        ended = run_python(
            code,
            env={"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])},
        )
        assert ended.returncode == 0, ended
        assert "closed" in ended.stdout

    def test_every_call_of_a_forked_child_is_refused(self, open_region: OpenRegion) -> None:
        """The child holds a copy of the connection, on which it must not speak: its answers would be the parent's."""
        region = open_region("region.fork=none")
        array = region.empty(5 * 4096, "u1")
        array[:] = 3
        child = os.fork()
        if not child:
            refused = 0
            for use in (
                lambda: region.empty(1), lambda: region.ndarray(1), lambda: region.buf, region.stats, lambda: region.flush(array),
                lambda: region.evict(array), lambda: region.prefetch(array), lambda: region.pin(array).__enter__(),
                lambda: region.discard(array),
            ):  # fmt: skip
                try:
                    use()
                except RegionError:
                    refused += 1
            region.close()
            os._exit(refused)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 9
        assert (array == 3).all(), "a child has discarded its parent's array"
        assert region.stats().programs == 1

    def test_closing_while_other_threads_use_it(self, open_region: OpenRegion) -> None:
        region = open_region()
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                while True:
                    region.stats()
            except dmh.DmhError:
                pass
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        region.close()
        for thread in threads:
            thread.join()
        assert errors == []


class TestFreeing:
    def test_many_arrays_do_not_hold_up_the_end(self, open_region: OpenRegion) -> None:
        """A worker that does not end in time is killed after five seconds."""
        region = open_region("region.size=8MiB")
        arrays = [region.empty(4096, "u1") for _ in range(2000)]
        began = time.monotonic()
        region.close()
        assert time.monotonic() - began < 3
        assert len(arrays) == 2000

    def test_a_free_that_meets_a_request_is_not_forgotten(self, open_region: OpenRegion) -> None:
        """Arrays end in any thread, also while another is in a request; their pages must go back without a further array."""
        region = open_region()
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                region.stats()

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for _ in range(50):
                arrays = [region.empty(4096, "u1") for _ in range(20)]
                del arrays
        finally:
            stop.set()
            asking.join()
        gc.collect()
        wait_until(lambda: region.stats().allocated == 0, "everything is given back", 5)

    def test_many_threads_ending_arrays_at_once(self, open_region: OpenRegion) -> None:
        region = open_region()
        errors: list[BaseException] = []
        unraisable: list[object] = []
        hook, sys.unraisablehook = sys.unraisablehook, lambda event: unraisable.append(event.exc_value)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)

        def work() -> None:
            try:
                for _ in range(100):
                    region.empty(4096, "u1")
            except BaseException as error:
                errors.append(error)

        try:
            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
            sys.unraisablehook = hook
        assert errors + unraisable == []

    ATTACHED = """
        import sys
        import dmh
        region = dmh.attach(sys.argv[1])
        array = region.empty(region.page_size * 20, "u1")
        array[:] = 1
        with region.pin(array[: region.page_size * 5]):
            print("ready", flush=True)
            sys.stdin.readline()
        """

    @pytest.mark.parametrize("how", ["ends", "is killed"])
    def test_what_a_program_held_is_given_back_when_it(self, open_region: OpenRegion, how: str) -> None:
        region = open_region("prefetch.enabled=false")
        program = start_python(self.ATTACHED, region.name)
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        stats = region.stats()
        assert (stats.programs, stats.allocated, stats.pinned) == (2, 20, 5)
        if how == "is killed":
            program.kill()
        program.communicate("")

        def given_back() -> bool:
            stats = region.stats()
            return (stats.programs, stats.allocated, stats.pinned, stats.states["new"]) == (1, 0, 0, stats.pages)

        wait_until(given_back, "everything is given back")
        with inside(region) as look:
            look.validate()

    def test_coming_and_going_leaves_nothing_in_the_launcher(self, open_region: OpenRegion) -> None:
        region = open_region()
        launcher = Path(f"/proc/{launcher_of(region)}/fd")

        def visit() -> None:
            with dmh.attach(region.name) as visitor:
                visitor.zeros(10)[0] = 1

        visit()
        before = len(list(launcher.iterdir()))
        for _ in range(10):
            visit()
        wait_until(lambda: region.stats().programs == 1, "the visitors are gone")
        assert len(list(launcher.iterdir())) <= before + 1
        assert region.stats().allocated == 0


class TestSharing:
    def test_what_one_wrote_and_was_evicted_another_reads(self, open_region: OpenRegion) -> None:
        region = open_region()
        array = region.empty((100, 4096), "u1")
        for page in range(100):
            array[page] = pattern(page, 4096)
        code = """
            import sys, zlib
            import dmh
            region = dmh.attach(sys.argv[1])
            array = region.ndarray((100, 4096), "u1", int(sys.argv[2]))
            print(zlib.crc32(array.tobytes()))
            array[:] = 255 - array
            """
        expected = np.stack([pattern(page, 4096) for page in range(100)])
        for _ in range(2):
            region.evict()
            ended = run_python(code, region.name, region.offset_of(array))
            assert ended.returncode == 0, ended.stderr
            assert int(ended.stdout) == zlib.crc32(expected.tobytes())
            expected = 255 - expected
            assert np.array_equal(array, expected)


class TestFlush:
    @pytest.mark.parametrize("inline", ["true", "false"])
    def test_what_was_stored_a_moment_ago_is_in_the_store(self, open_region: OpenRegion, inline: str) -> None:
        """The kernel lets a thread go on as soon as its page is filled, before the table says RESIDENT: flush must not miss it."""
        region = open_region(
            "prefetch.enabled=false", f"workers.inline={inline}", "region.size=8MiB", "memory.limit=4MiB"
        )
        array = region.empty((1000, 4096), "u1")
        missed = []
        # Others want the processors too, so that a worker is interrupted between the two now and then.
        busy = [start_python("while True: pass") for _ in range(3)]
        try:
            with inside(region) as look:
                first = page_of(region, array)
                for page in range(1000):
                    array[page, 5] = 1
                    region.flush(array[page])
                    if look.table.copies[first + page] != Copy.VALID:
                        missed.append(page)
        finally:
            for process in busy:
                process.kill()
                process.communicate()
        assert missed == []

    def test_pages_that_another_program_keeps_reading_are_written_as_well(
        self, open_region: OpenRegion, tmp_path: Path
    ) -> None:
        """The reader takes each page back the moment it is captured, and that must not make flush pass over it."""
        region = open_region(f"store.url=file://{tmp_path}/pages", "prefetch.enabled=false")
        array = region.zeros((4, 4096), "u1")
        code = """
            import sys
            import dmh
            region = dmh.attach(sys.argv[1])
            array = region.ndarray((4, 4096), "u1", int(sys.argv[2]))
            print("ready", flush=True)
            while True:
                array[:, 8].sum()
            """
        reader = start_python(code, region.name, region.offset_of(array))
        try:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
            stale = 0
            with open(tmp_path / "pages", "rb", buffering=0) as file:
                for turn in range(200):
                    array[:, 0] = turn % 250 + 1
                    region.flush(array)
                    for page in range(4):
                        stored = os.pread(file.fileno(), 1, region.offset_of(array) + page * 4096)
                        stale += stored != bytes([turn % 250 + 1])
        finally:
            reader.kill()
            reader.communicate()
        assert stale == 0, f"{stale} of 800 pages were not written"

    def test_a_victim_buffer_full_of_marked_pages_gives_way(self, open_region: OpenRegion) -> None:
        """Marked pages that fill the buffer are no reason to refuse: the store takes them."""
        region = open_region(
            "evictor.policy=idle-walk",
            "memory.limit=48KiB",
            "evictor.buffer=3 pages",
            "region.size=1MiB",
            "prefetch.window=1 pages",
        )
        array = region.empty((24, 4096), "u1")
        rng = np.random.default_rng(5)
        for turn in range(150):
            pages = rng.integers(0, 24, 6)
            array[pages, 0] = turn % 250 + 1
            region.flush(array[int(pages[0])])
            region.flush(array)

    def test_a_store_that_refuses_is_told_and_loses_nothing(self, open_region: OpenRegion, tmp_path: Path) -> None:
        """Also where the victim buffer is full of what could not be written, so that nothing more can be captured."""
        region = open_region(
            f"store.url=file://{tmp_path}/pages", "store.timeout=500ms", "prefetch.enabled=false", "memory.limit=64KiB", "evictor.buffer=4 pages",
        )  # fmt: skip
        stuck, array = region.empty((4, 4096), "u1"), region.empty((4, 4096), "u1")
        stuck[:], array[:] = 1, 2
        with inside(region) as look:
            (evictor,) = look.workers["evictor"]
            before = resource.prlimit(
                evictor, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY)
            )  # its writes fail from now on
            with pytest.raises(RegionError, match="did not take every page"):
                region.flush(stuck)
            with pytest.raises(RegionError, match="did not take every page: .*File too large"):
                region.evict(stuck)
            assert look.table.staged == 4  # the victim buffer is full
            with pytest.raises(RegionError, match="did not take every page"):
                region.flush(array)
            resource.prlimit(evictor, resource.RLIMIT_FSIZE, before)
            region.flush()
            first = page_of(region, stuck)
            assert look.table.copies[first : first + 8].tolist() == [Copy.VALID] * 8
        region.evict()
        assert (stuck == 1).all()
        assert (array == 2).all()

    def test_without_an_array_everything_is_written(self, open_region: OpenRegion, tmp_path: Path) -> None:
        region = open_region(f"store.url=file://{tmp_path}/pages")
        array = region.empty((200, 4096), "u1")
        for page in range(200):
            array[page] = pattern(page, 4096)
        region.flush()
        first = page_of(region, array)
        content = (tmp_path / "pages").read_bytes()[first * 4096 :]
        assert content[: 200 * 4096] == b"".join(pattern(page, 4096).tobytes() for page in range(200))


class TestPins:
    def test_a_pin_holds_until_the_last_of_several(self, open_region: OpenRegion) -> None:
        region = open_region("prefetch.enabled=false")
        array, other = region.empty(4 * 4096, "u1"), region.empty(region.size // 2, "u1")
        with inside(region) as look:
            first = page_of(region, array)
            with region.pin(array), region.pin(array[: 2 * 4096]):
                pass
            with region.pin(array):
                with region.pin(array):
                    array[:] = 1
                other[:] = 2
                assert look.states(first, 4) == [State.RESIDENT] * 4
            assert region.stats().pinned == 0

    def test_all_that_may_be_pinned_leaves_enough_to_work_with(
        self, open_region: OpenRegion, rng: np.random.Generator
    ) -> None:
        region = open_region("memory.limit=32KiB", "evictor.buffer=1 pages", "workers.resolvers=4")
        held = region.empty(3 * 4096, "u1")
        data = rng.integers(0, 256, 50 * 4096, np.uint8)
        first, second = region.empty(data.shape, "u1"), region.empty(data.shape, "u1")
        with region.pin(held):
            held[:] = 9
            first[:] = data
            second[1:] = first[:-1]
            assert np.array_equal(second[1:], data[:-1])
            assert (held == 9).all()

    def test_the_pin_is_undone_where_the_block_raises(self, open_region: OpenRegion) -> None:
        region = open_region()
        array = region.empty(4096, "u1")
        with pytest.raises(KeyError), region.pin(array):
            raise KeyError
        assert region.stats().pinned == 0


class TestLostPages:
    READER = """
        import sys
        import dmh
        region = dmh.attach(sys.argv[1])
        array = region.ndarray(4096, "u1", int(sys.argv[2]))
        print(array[0])
        """

    def spoil(self, region: dmh.Region, path: Path, array: np.ndarray) -> None:
        array[:] = 7
        region.evict(array)
        with open(path, "r+b") as file:
            file.seek(region.offset_of(array) + 100)
            file.write(b"\x08")

    def test_an_altered_page_is_sigbus_for_every_program_and_nobody_hangs(
        self, open_region: OpenRegion, tmp_path: Path
    ) -> None:
        """Each program has its own userfaultfd: those that join after the page was lost have to be told as well."""
        region = open_region(f"store.url=file://{tmp_path}/pages", "prefetch.enabled=false")
        array = region.empty(4096, "u1")
        self.spoil(region, tmp_path / "pages", array)
        endings = []
        for _ in range(4):
            try:
                endings.append(run_python(self.READER, region.name, region.offset_of(array), timeout=6).returncode)
            except subprocess.TimeoutExpired:
                endings.append("hung")
        assert endings == [-signal.SIGBUS] * 4
        assert region.stats().counters["poisoned"] == 1

    def test_a_lost_page_is_usable_again_once_it_is_discarded(self, open_region: OpenRegion, tmp_path: Path) -> None:
        region = open_region(f"store.url=file://{tmp_path}/pages", "prefetch.enabled=false")
        array = region.empty(4096, "u1")
        self.spoil(region, tmp_path / "pages", array)
        assert run_python(self.READER, region.name, region.offset_of(array)).returncode == -signal.SIGBUS
        region.discard(array)
        assert not array.any()
        array[:] = 5
        region.evict(array)
        assert (array == 5).all()
        with inside(region) as look:
            look.validate()


class TestSurroundings:
    def test_modules_in_the_current_directory_are_the_programs_and_not_dmhs(self, tmp_path: Path) -> None:
        """A program may well have a package `workers` or a module queue.py: the service's processes must not import those."""
        (tmp_path / "workers").mkdir()
        (tmp_path / "workers" / "__init__.py").write_text("")
        (tmp_path / "queue.py").write_text("raise SystemExit('the wrong queue')")
        (tmp_path / "wire.json").write_text(settings().to_wire())
        code = """
            import sys
            sys.path[:] = [path for path in sys.path if path]  # as when a script is run from elsewhere
            import dmh
            from dmh.config import Config
            with dmh.open(Config.from_wire(open("wire.json").read())) as region:
                a = region.zeros(100_000)
                a[:] = 1
                print(a.sum())
            """
        ended = run_python(code, cwd=tmp_path)
        assert ended.stdout == "100000.0\n", ended.stderr[-2000:]
