"""The settings: their names, types, defaults, ranges and descriptions, as one frozen pydantic model.

Pure: knows no file, no environment and no page counts.  `load` makes a `Config` from YAML, `limits` turns the memory
settings into pages.  The launcher holds the `Config` and hands it to the workers with `to_wire`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
)
from pydantic import ValidationError as _ValidationError
from pydantic.json_schema import GenerateJsonSchema

from dmh.config.quantity import KIB, MIB, Amount, format_size, parse_duration, parse_size, refusal, show
from dmh.errors import ProtocolError
from dmh.evict.policies import policy_names

POLICIES = tuple(policy_names())
IDLE_SOURCES = ("auto", "page_idle", "unmap", "buffer", "none")

PAGE_SIZE_MIN, PAGE_SIZE_MAX = 4 * KIB, 2 * MIB
# Half of the 47 bits that a process has on x86-64 and arm64: the mapping must find one free range among all others.
REGION_SIZE_MAX = 1 << 46

_NAME_FORM = "1 to 64 letters, digits, '.', '_' or '-', a letter or digit first"
_CPUS_FORM = '"auto", "any" or a list of CPU numbers such as [0, 2]'
_ADDRESS_FORM = '"off" or host:port such as 127.0.0.1:9464 or "[::1]:9464"'
_ADDRESS_PATTERN = r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+):(?P<port>[0-9]{1,5})"
_SIZE_PATTERN = r"^\s*[0-9]+(\.[0-9]+)?\s*(B|KiB|MiB|GiB|TiB|kB|MB|GB|TB)?\s*$"
_PAGES_PATTERN = r"^\s*[0-9]+\s*pages?\s*$"


def _parse_name(value: object) -> str:
    # The name becomes part of a path (the service's directory) and an argument, so neither ".." nor "-x" may be one.
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        return value
    hint = "put it in quotes" if isinstance(value, int | float) else ""
    raise refusal(value, _NAME_FORM, hint)


def _parse_region_size(value: object) -> int:
    size = parse_size(value)
    if size > REGION_SIZE_MAX:
        raise refusal(value, f"at most {format_size(REGION_SIZE_MAX)} (what a process can address)")
    return size


def _parse_page_size(value: object) -> int:
    size = parse_size(value)
    if not PAGE_SIZE_MIN <= size <= PAGE_SIZE_MAX or size & (size - 1):
        raise refusal(value, f"a power of two from {format_size(PAGE_SIZE_MIN)} to {format_size(PAGE_SIZE_MAX)}")
    return size


def _parse_spin(value: object) -> int | str:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1000):
        return value
    raise refusal(value, '"auto" or an integer from 0 to 1000')


def _parse_cpus(value: object) -> str | tuple[int, ...]:
    if isinstance(value, str) and value in ("auto", "any"):
        return value
    if isinstance(value, list | tuple) and value:
        numbers = tuple(cpu for cpu in value if isinstance(cpu, int) and not isinstance(cpu, bool) and cpu >= 0)
        if len(numbers) == len(value) == len(set(numbers)):
            return numbers
    raise refusal(value, _CPUS_FORM, "each CPU once, from 0" if isinstance(value, list | tuple) else "")


def _parse_address(value: object) -> str:
    if value is False or value == "off":  # YAML reads a bare off as false
        return "off"
    if isinstance(value, str) and (match := re.fullmatch(_ADDRESS_PATTERN, value)) and int(match["port"]) < 1 << 16:
        return value
    raise refusal(value, _ADDRESS_FORM)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of an address that the model has accepted."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _parse_key_source(value: object) -> str:
    if value == "none" or (isinstance(value, str) and re.fullmatch(r"file:.+|env:[A-Za-z_][A-Za-z0-9_]*", value)):
        return value
    # Not quoted: it may be the key.
    raise ValueError(
        "must be none, file:PATH or env:VARIABLE; the key itself does not belong in a configuration (what was found is "
        "not shown)"
    )


def _one_of(choices: tuple[str, ...]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in choices:
            raise refusal(value, f"one of {', '.join(choices)}")
        return value

    return AfterValidator(check)


def _size_schema(*more: dict[str, Any]) -> WithJsonSchema:
    text = {"type": "string", "pattern": _SIZE_PATTERN, "examples": ["4GiB", "512 MiB", "100MB"]}
    return WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, text, *more]})


_PAGES = {"type": "string", "pattern": _PAGES_PATTERN, "examples": ["20 pages"]}
_FRACTION = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_DURATION = {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*(ms|s|min|h)?\s*$", "examples": ["250ms", "5min"]}
_CPU_LIST = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "uniqueItems": True}
_AS_PLAIN = PlainSerializer(Amount.plain)

_Name = Annotated[
    str, PlainValidator(_parse_name), WithJsonSchema({"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"})
]
_Size = Annotated[int, PlainValidator(parse_size), _size_schema()]
_RegionSize = Annotated[int, PlainValidator(_parse_region_size), _size_schema()]
_PageSize = Annotated[int, PlainValidator(_parse_page_size), _size_schema()]
_Share = Annotated[Amount, PlainValidator(Amount.parse), _AS_PLAIN, _size_schema(_FRACTION, _PAGES)]
_Extent = Annotated[Amount, PlainValidator(Amount.parse_extent), _AS_PLAIN, _size_schema(_PAGES)]
_Seconds = Annotated[
    float,
    PlainValidator(parse_duration),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0.001, "maximum": 86400}, _DURATION]}),
]
_KeySource = Annotated[
    str,
    PlainValidator(_parse_key_source),
    WithJsonSchema({"type": "string", "pattern": "^(none|file:.+|env:[A-Za-z_][A-Za-z0-9_]*)$"}),
]
_Spin = Annotated[
    Literal["auto"] | int,
    BeforeValidator(_parse_spin),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 0, "maximum": 1000}]}),
]
_Cpus = Annotated[
    Literal["auto", "any"] | tuple[int, ...],
    BeforeValidator(_parse_cpus),
    WithJsonSchema({"anyOf": [{"enum": ["auto", "any"]}, _CPU_LIST]}),
]


_Address = Annotated[
    str,
    PlainValidator(_parse_address),
    WithJsonSchema({"anyOf": [{"enum": ["off", False]}, {"type": "string", "pattern": "^.+:[0-9]{1,5}$"}]}),
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RegionConfig(_Section):
    """The byte range that programs use."""

    name: _Name = Field(default="dmh", description="Name of the region and its service; one service a name.")
    size: _RegionSize = Field(
        description="Bytes of address space that programs get; a multiple of page_size, at most 64TiB."
    )
    page_size: _PageSize = Field(
        default=4 * KIB, description="Bytes moved and tracked as one; a power of two from 4KiB to 2MiB."
    )
    seal: bool = Field(
        default=False,
        description="Seal the mapping (mseal) where the kernel can, so that no stray munmap or mmap in the program "
        "replaces it; it then lives until the process ends.",
    )
    fork: Literal["auto", "follow", "none"] = Field(
        default="auto",
        description="follow: a forked child shares the region; a program needs CAP_SYS_PTRACE. none: it does not "
        "inherit the region (SIGSEGV on access). auto: follow where the program may.",
    )


class MemoryConfig(_Section):
    """How much local memory the region may use; pages in the region and pages in the victim buffer both count."""

    limit: _Size = Field(
        description="Hard limit in bytes, never exceeded: at least 8 pages, at most the region. Rounded down to pages."
    )
    high: _Share = Field(
        default=Amount(0.98, "fraction"),
        description="Eviction starts when this much is in use: a fraction of limit, a size or a page count. While "
        "faults come fast it starts earlier, unless high or low is a size or a page count.",
    )
    low: _Share = Field(
        default=Amount(0.88, "fraction"),
        description="Eviction stops when use has fallen to this; below high. A fraction of limit, a size or a page "
        "count. While faults come slowly it stops earlier, unless high or low is a size or a page count.",
    )


class WorkersConfig(_Section):
    """The processes that resolve faults."""

    resolvers: int = Field(
        default=2, ge=1, le=64, description="Resolver processes: how many requests to the store at a time."
    )
    inline: bool = Field(
        default=True,
        description="Let the monitor resolve at once what cannot block: new pages and pages in the victim buffer.",
    )
    spin_us: _Spin = Field(
        default="auto",
        description="Microseconds (0 to 1000) a worker polls for the next message before it sleeps; auto polls only "
        "where there are CPUs to spare. 0 also lets the other of two CPUs sleep while one thread faults.",
    )
    cpus: _Cpus = Field(
        default="auto",
        description="CPUs for the workers: auto places them, any leaves them to the scheduler, a list such as [0, 2] "
        "pins them to those.",
    )


class EvictorConfig(_Section):
    """What leaves local memory, and how."""

    policy: Annotated[str, _one_of(POLICIES)] = Field(
        default="auto",
        description="How victims are chosen: auto, or one that docs/policies.md compares with it.",
        json_schema_extra={"enum": list(POLICIES)},
    )
    idle: Annotated[str, _one_of(IDLE_SOURCES)] = Field(
        default="auto",
        description="How a page's use is told: page_idle by the kernel's idle page tracking, unmap by taking it out of "
        "the page tables, buffer by moving it to the victim buffer, none not at all; auto takes the first of them that "
        "works here for policies that do better by it (idle-walk, s3fifo, lirs, clock), else none.",
        json_schema_extra={"enum": list(IDLE_SOURCES)},
    )
    buffer: _Share = Field(
        default=Amount(0.02, "fraction"),
        description="Victim buffer, out of memory.limit: pages on their way to the store. A fraction below 0.5 of the "
        "limit, a size or a page count.",
    )
    mark_budget: float = Field(
        default=0.1,
        ge=0,
        le=1,
        strict=False,
        description="The share of one CPU that marking pages (page_idle, unmap) may take.",
    )
    batch: int = Field(default=256, ge=1, le=4096, description="Most pages captured in one go.")


class PrefetchConfig(_Section):
    """Reading ahead of a program that scans."""

    enabled: bool = Field(default=True, description="Read ahead of sequential and strided access.")
    window: _Extent = Field(
        default=Amount(4 * MIB, "bytes"),
        description="The furthest to read ahead: a size or a page count; never above an eighth of resident memory.",
    )


class StoreConfig(_Section):
    """The DMS: where pages go that do not fit."""

    url: str = Field(
        min_length=1,
        description="Which store: file:///path, file:relative/path, memory:, redis://host:port/db, unix:///socket, ... "
        "~ and ${VARIABLE} are replaced.",
    )
    timeout: _Seconds = Field(
        default=30.0, description="A request, retries included, fails after this: 250ms, 30s, 5min, ..."
    )
    on_failure: Literal["wait", "poison"] = Field(
        default="wait",
        description="After a failed request: wait goes on trying while the program stands still, poison gives the "
        "program SIGBUS on that page.",
    )

    encrypt: _KeySource = Field(
        default="none",
        description="Encrypt pages (AES-256-GCM) before the store gets them: file:PATH or env:VARIABLE says where the "
        "key of 32 bytes is; none: no encryption.",
    )


class ServiceConfig(_Section):
    """What programs do when processes of their service die, and who may watch the service."""

    grace: _Seconds = Field(
        default=5.0,
        description="A program goes on, its page faults waiting, this long after its whole service has died; then it "
        "is ended with a message.",
    )
    grace_launcher: _Seconds = Field(
        default=600.0,
        description="A program goes on this long while workers live and no launcher takes over from one that died.",
    )
    metrics: _Address = Field(
        default="off",
        description="Where the launcher serves its figures to Prometheus, as 127.0.0.1:9464: counters and sizes, to "
        "whoever can connect.",
    )


class RecordConfig(_Section):
    """A recording of the pages that come in, for `dmh simulate`."""

    file: str = Field(default="", description="Record to this file, which is replaced; nothing is recorded without.")
    max_size: _Size = Field(default=1024 * MIB, description="The recording ends when the file has grown to this size.")


class Config(_Section):
    """Everything a service is told, validated once; made by `dmh.config.load`."""

    region: RegionConfig
    memory: MemoryConfig
    workers: WorkersConfig = Field(default_factory=WorkersConfig)
    evictor: EvictorConfig = Field(default_factory=EvictorConfig)
    prefetch: PrefetchConfig = Field(default_factory=PrefetchConfig)
    store: StoreConfig
    service: ServiceConfig = Field(default_factory=ServiceConfig)
    record: RecordConfig = Field(default_factory=RecordConfig)

    def to_wire(self) -> str:
        """This configuration as JSON, for a worker's `from_wire`.  Holds the store's password, if its URL does.

        What was left to its default stays so: `Limits.of` asks which settings were written.
        """
        return self.model_dump_json(exclude_unset=True)

    @classmethod
    def from_wire(cls, text: str | bytes) -> Config:
        """The configuration that another process of this version wrote with `to_wire`.

        Raises:
            ProtocolError: `text` is something else.
        """
        try:
            return cls.model_validate_json(text)
        except _ValidationError as error:
            where = ".".join(map(str, error.errors(include_input=False)[0]["loc"])) or "not JSON"
            raise ProtocolError(f"a configuration that another version wrote, or damaged ({where})") from None


SECTIONS: dict[str, type[_Section]] = {
    "region": RegionConfig,
    "memory": MemoryConfig,
    "workers": WorkersConfig,
    "evictor": EvictorConfig,
    "prefetch": PrefetchConfig,
    "store": StoreConfig,
    "service": ServiceConfig,
    "record": RecordConfig,
}


def describe_native(section: str, key: str, value: object) -> str:
    """The message for a value that pydantic itself refused, from the range or choice that the field declares."""
    schema = SECTIONS[section].model_json_schema()["properties"][key]
    if "enum" in schema:
        form = f"one of {', '.join(schema['enum'])}"
    elif schema["type"] == "number":
        form = f"a number from {schema['minimum']} to {schema['maximum']}"
    elif schema["type"] == "integer":
        form = f"an integer from {schema['minimum']} to {schema['maximum']}"
    else:
        form = {"boolean": "true or false", "string": "text"}[schema["type"]]
    return f"must be {form}, is {show(value)}"


class _PlainDefaults(GenerateJsonSchema):
    """Shows the default of an amount as it would be written, not as the object that it is."""

    def encode_default(self, dft: Any) -> Any:
        return dft.plain() if isinstance(dft, Amount) else super().encode_default(dft)


def config_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors and other programs."""
    schema = Config.model_json_schema(schema_generator=_PlainDefaults)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
