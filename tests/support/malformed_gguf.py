"""GGUF files assembled with struct: broken ones with the field that breaks, and good ones.

They re-create the cases of llama.cpp's own GGUF test, those that the `gguf` package's reader accepts though
it must not, and those behind the known vulnerabilities of other parsers.
"""

from __future__ import annotations

import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
MAX64 = 2**64 - 1
SIZES = [struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32 - 1, 2**40, 2**61, 2**63 - 1, 2**63, MAX64)]


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def kv(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def array(key: str, kind: int, count: int, payload: bytes) -> bytes:
    return kv(key, ARRAY, struct.pack("<IQ", kind, count) + payload)


def u32(key: str, value: int) -> bytes:
    return kv(key, U32, struct.pack("<I", value))


def info(
    name: str | bytes = "t", dims=(4,), kind: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    n_dims = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", n_dims, *dims, kind, offset)


def gguf(
    *, magic=b"GGUF", version=3, kvs=(), infos=(), data=b"", n_kv=None, n_tensors=None, alignment=32
) -> bytes:
    n_kv = len(kvs) if n_kv is None else n_kv
    n_tensors = len(infos) if n_tensors is None else n_tensors
    head = magic + struct.pack("<IQQ", version, n_tensors, n_kv) + b"".join(kvs) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data


ONE = gguf(kvs=[u32("a.b", 1)], infos=[info()], data=bytes(32))
TWO = [info("t", (8,)), info("u", (8,), offset=32)]

# name -> (bytes, field of the error)
BAD: dict[str, tuple[bytes, str]] = {
    # header
    "empty file": (b"", "magic"),
    "two bytes": (b"GG", "magic"),
    "bad magic": (gguf(magic=b"FGGU"), "magic"),
    "ggml's older magic": (gguf(magic=b"ggjt"), "magic"),
    "no version": (b"GGUF", "version"),
    "version 0": (gguf(version=0), "version"),
    "version 1": (gguf(version=1), "version"),
    "version of the future": (gguf(version=4), "version"),
    "big endian": (gguf(version=3 << 24), "version"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "n_tensors"),
    "no n_kv": (b"GGUF" + struct.pack("<IQ", 3, 0), "n_kv"),
    "n_tensors 2^64-1": (gguf(n_tensors=MAX64), "n_tensors"),
    "n_tensors beyond the file": (gguf(n_tensors=1), "n_tensors"),
    "n_kv 2^64-1": (gguf(n_kv=MAX64), "n_kv"),
    "n_kv beyond the file": (gguf(n_kv=3), "n_kv"),
    # keys
    "key of 2^64-1 bytes": (gguf(kvs=[struct.pack("<Q", MAX64) + bytes(64)]), "kv[0].key.length"),
    "key longer than the file": (gguf(kvs=[struct.pack("<Q", 4096) + bytes(64)]), "kv[0].key.length"),
    "key of 64 KiB": (gguf(kvs=[u32("k" * 65536, 1)]), "kv[0].key.length"),
    "empty key": (gguf(kvs=[u32("", 1)], data=bytes(32)), "kv[0].key"),
    "key that is not UTF-8": (gguf(kvs=[u32(b"a\xff", 1)]), "kv[0].key"),
    "key with a terminal escape": (gguf(kvs=[u32("a\x1b[2J", 1)]), "kv[0].key"),
    "key with NUL": (gguf(kvs=[u32("a\0b", 1)]), "kv[0].key"),
    "duplicate key": (gguf(kvs=[u32("a", 1), u32("a", 2)]), "kv[1].key"),
    # values
    "value type 13": (gguf(kvs=[kv("a", 13, bytes(8))]), "a.type"),
    "value type 2^32-1": (gguf(kvs=[kv("a", 2**32 - 1, bytes(8))]), "a.type"),
    "cut before the type": (gguf(kvs=[text("a" * 8) + b"\0\0"], alignment=1), "aaaaaaaa.type"),
    "cut inside a u64": (gguf(kvs=[kv("a" * 8, U64, bytes(7))], alignment=1), "aaaaaaaa"),
    "bool of 2": (gguf(kvs=[kv("a", BOOL, b"\x02")], data=bytes(32)), "a"),
    "string of 2^64-1 bytes": (gguf(kvs=[kv("a", STRING, struct.pack("<Q", MAX64))]), "a.length"),
    "string that wraps the offset": (gguf(kvs=[kv("a", STRING, struct.pack("<Q", MAX64 - 20))]), "a.length"),
    "string longer than the file": (gguf(kvs=[kv("a", STRING, struct.pack("<Q", 64))]), "a.length"),
    "string that is not UTF-8": (gguf(kvs=[kv("a", STRING, text(b"\xc3"))]), "a"),
    "cut inside a string's length": (
        gguf(kvs=[kv("a" * 8, STRING, bytes(3))], alignment=1),
        "aaaaaaaa.length",
    ),
    "array of arrays": (gguf(kvs=[array("a", ARRAY, 1, struct.pack("<IQ", U8, 0))]), "a.element_type"),
    "array of an unknown type": (gguf(kvs=[array("a", 13, 1, bytes(8))]), "a.element_type"),
    "array of 2^64-1": (gguf(kvs=[array("a", U32, MAX64, bytes(8))]), "a.length"),
    "array of 2^30-1 bytes": (gguf(kvs=[array("a", U8, 2**30 - 1, bytes(8))]), "a.length"),
    "array of 2^30-1 strings": (gguf(kvs=[array("a", STRING, 2**30 - 1, bytes(8))]), "a.length"),
    "array above the limit": (gguf(kvs=[array("a", U8, 2**30 + 1, bytes(8))]), "a.length"),
    "array whose size wraps": (gguf(kvs=[array("a", U64, 2**61, bytes(8))]), "a.length"),
    "array element beyond the file": (gguf(kvs=[array("a", U64, 2, bytes(8))], alignment=1), "a.length"),
    "array string beyond the file": (
        gguf(kvs=[array("a", STRING, 2, text("x") + struct.pack("<Q", 99))], alignment=1),
        "a[1].length",
    ),
    "array string of 2^64-1 bytes": (
        gguf(kvs=[array("a", STRING, 1, struct.pack("<Q", MAX64) + bytes(16))]),
        "a[0].length",
    ),
    "array string that is not UTF-8": (gguf(kvs=[array("a", STRING, 1, text(b"\xff"))]), "a[0]"),
    "array with a bool of 3": (gguf(kvs=[array("a", BOOL, 2, b"\x01\x03")], data=bytes(32)), "a"),
    # alignment
    "alignment 0": (gguf(kvs=[u32("general.alignment", 0)]), "general.alignment"),
    "alignment 48": (gguf(kvs=[u32("general.alignment", 48)]), "general.alignment"),
    "alignment as u64": (
        gguf(kvs=[kv("general.alignment", U64, struct.pack("<Q", 32))]),
        "general.alignment.type",
    ),
    "alignment as string": (
        gguf(kvs=[kv("general.alignment", STRING, text("32"))]),
        "general.alignment.type",
    ),
    "offsets of another alignment": (
        gguf(kvs=[u32("general.alignment", 64)], infos=TWO, data=bytes(128), alignment=64),
        "u.offset",
    ),
    "offsets of half the alignment": (
        gguf(kvs=[u32("general.alignment", 16)], infos=[TWO[0], info("u", (6,), offset=48)], data=bytes(96)),
        "u.offset",
    ),
    # tensor infos
    "tensor name of 2^64-1 bytes": (
        gguf(infos=[struct.pack("<Q", MAX64) + bytes(64)]),
        "tensor[0].name.length",
    ),
    "tensor name of 64 bytes": (gguf(infos=[info("n" * 64)], data=bytes(32)), "tensor[0].name.length"),
    "tensor name of 65 bytes": (gguf(infos=[info("n" * 65)], data=bytes(32)), "tensor[0].name.length"),
    "empty tensor name": (gguf(infos=[info("")], data=bytes(32)), "tensor[0].name"),
    "tensor name with ../": (gguf(infos=[info("../../t")], data=bytes(32)), "tensor[0].name"),
    "tensor name with NUL": (gguf(infos=[info("a\0b")], data=bytes(32)), "tensor[0].name"),
    "tensor name that is not UTF-8": (gguf(infos=[info(b"\xff\xfe")], data=bytes(32)), "tensor[0].name"),
    "duplicate tensor name": (gguf(infos=[info(), info(offset=32)], data=bytes(64)), "tensor[1].name"),
    "no dimension": (gguf(infos=[info(dims=())], data=bytes(32)), "t.n_dims"),
    "five dimensions": (gguf(infos=[info(dims=(1, 1, 1, 1, 1))], data=bytes(32)), "t.n_dims"),
    "2^32-1 dimensions": (gguf(infos=[info(n_dims=2**32 - 1)], data=bytes(32)), "t.n_dims"),
    "cut inside the dimensions": (
        gguf(infos=[text("t" * 9) + struct.pack("<IQI", 2, 4, 0)], alignment=1),
        "ttttttttt.dims[1]",
    ),
    "cut before the type of a tensor": (
        gguf(infos=[text("t" * 9) + struct.pack("<IQ", 1, 4)], alignment=1, data=b"\0\0"),
        "ttttttttt.type",
    ),
    "cut before the offset": (gguf(infos=[info("t" * 9)[:-8]], alignment=1), "ttttttttt.offset"),
    "negative dimension": (gguf(infos=[info(dims=(4, MAX64))], data=bytes(32)), "t.dims"),
    "elements that wrap": (gguf(infos=[info(dims=(2**32, 2**32))], data=bytes(32)), "t.dims"),
    "2^63-1 times 2": (gguf(infos=[info(dims=(2**63 - 1, 2))], data=bytes(32)), "t.dims"),
    "a zero that hides 2^62": (gguf(infos=[info(dims=(4, 0, 2**62))], data=bytes(32)), "t.dims"),
    "two zeros that hide 2^62": (gguf(infos=[info(dims=(0, 0, 2**62), kind=24)], data=bytes(32)), "t.dims"),
    "bytes that wrap": (gguf(infos=[info(dims=(2**62, 1), kind=0)], data=bytes(32)), "t.dims"),
    "a zero that hides a wrap": (gguf(infos=[info(dims=(2**40, 0, 2**40))], data=bytes(32)), "t.dims"),
    "Q4_0 bytes that wrap": (gguf(infos=[info(dims=(2**62, 32), kind=2)], data=bytes(32)), "t.dims"),
    "type beyond the last": (gguf(infos=[info(kind=1000)], data=bytes(32)), "t.type"),
    "negative type": (gguf(infos=[info(kind=2**32 - 1)], data=bytes(32)), "t.type"),
    "removed type Q4_2": (gguf(infos=[info(dims=(32,), kind=4)], data=bytes(32)), "t.type"),
    "removed type Q4_0_4_4": (gguf(infos=[info(dims=(32,), kind=31)], data=bytes(32)), "t.type"),
    "a type of today in a PowerInfer file": (
        gguf(magic=b"PWRI", infos=[info(dims=(256,), kind=19)], data=bytes(64)),
        "t.type",
    ),
    "Q4_0 rows of 33": (gguf(infos=[info(dims=(33, 32), kind=2)], data=bytes(640)), "t.dims"),
    "Q6_K rows of 128": (gguf(infos=[info(dims=(128, 2), kind=14)], data=bytes(256)), "t.dims"),
    # tensor data
    "offset not 0 first": (gguf(infos=[info(offset=32)], data=bytes(64)), "t.offset"),
    "unaligned offset": (gguf(infos=[info("t"), info("u", offset=16)], data=bytes(64)), "u.offset"),
    "offset that wraps": (gguf(infos=[info(offset=2**64 - 32)], data=bytes(64)), "t.offset"),
    "overlapping tensors": (gguf(infos=[info("t"), info("u")], data=bytes(64)), "u.offset"),
    "gap between tensors": (gguf(infos=[info("t"), info("u", offset=64)], data=bytes(96)), "u.offset"),
    "no data": (gguf(infos=[info()]), "t.data"),
    "data cut by one byte": (gguf(infos=[info(dims=(8,))], data=bytes(31)), "t.data"),
    "second tensor cut": (gguf(infos=TWO, data=bytes(33)), "u.data"),
    "padding of the header missing": (gguf(infos=[info()], alignment=1), "t.data"),
    "exabyte tensor": (gguf(infos=[info(dims=(2**58,))], data=bytes(32)), "t.data"),
}

GOOD = {
    "nothing": gguf(),
    "version 2": gguf(version=2),
    "one tensor": ONE,
    "two tensors": gguf(infos=TWO, data=bytes(64)),
    "a zero dimension": gguf(infos=[info(dims=(4, 0)), info("u")], data=bytes(32)),
    "last padding missing": gguf(infos=TWO, data=bytes(64)),
    "alignment 64": gguf(
        kvs=[u32("general.alignment", 64)],
        infos=[info("t"), info("u", offset=64)],
        data=bytes(128),
        alignment=64,
    ),
    "alignment 1": gguf(
        kvs=[u32("general.alignment", 1)],
        infos=[info("t"), info("u", offset=16)],
        data=bytes(32),
        alignment=1,
    ),
    "every value type": gguf(
        kvs=[
            *(kv(f"k{kind}", kind, bytes(size)) for kind, size in ((U8, 1), (I8, 1), (U16, 2), (I16, 2))),
            *(kv(f"k{kind}", kind, bytes(size)) for kind, size in ((U32, 4), (I32, 4), (F32, 4), (BOOL, 1))),
            *(kv(f"k{kind}", kind, bytes(8)) for kind in (U64, I64, F64)),
            kv("s", STRING, text("ü")),
            array("empty", STRING, 0, b""),
            array("strings", STRING, 2, text("") + text("é")),
            array("bools", BOOL, 2, b"\0\1"),
        ]
    ),
}

# llama.cpp's tests/test-gguf.cpp: its 34 hand-made files, as they are called here
LLAMA_CPP = {
    "HEADER_BAD_MAGIC": "bad magic",
    "HEADER_BAD_VERSION_0": "version 0",
    "HEADER_BAD_VERSION_1": "version 1",
    "HEADER_BAD_VERSION_FUTURE": "version of the future",
    "HEADER_BAD_N_TENSORS": "n_tensors 2^64-1",
    "HEADER_BAD_N_KV": "n_kv 2^64-1",
    "HEADER_EMPTY": "nothing",
    "KV_BAD_KEY_SIZE": "key of 2^64-1 bytes",
    "KV_EMPTY_KEY": "empty key",
    "KV_BAD_TYPE": "value type 2^32-1",
    "KV_DUPLICATE_KEY": "duplicate key",
    "KV_BAD_ALIGN": "alignment 48",
    "KV_WRONG_TYPE_ALIGN": "alignment as u64",
    "KV_SUCCESS": "every value type",
    "TENSORS_BAD_NAME_SIZE": "tensor name of 2^64-1 bytes",
    "TENSORS_BAD_N_DIMS": "2^32-1 dimensions",
    "TENSORS_BAD_SHAPE": "negative dimension",
    "TENSORS_ZERO_DIM": "a zero dimension",
    "TENSORS_NE_TOO_BIG": "elements that wrap",
    "TENSORS_NBYTES_TOO_BIG": "bytes that wrap",
    "TENSORS_NBYTES_PAD_WRAP": "2^63-1 times 2",
    "TENSORS_BAD_TYPE": "negative type",
    "TENSORS_BAD_OFFSET": "unaligned offset",
    "TENSORS_DUPLICATE_NAME": "duplicate tensor name",
    "TENSORS_BAD_ALIGN": "alignment 0",
    "TENSORS_INCONSISTENT_ALIGN": "offsets of another alignment",
    "TENSORS_SUCCESS": "one tensor",
    "TENSORS_CUSTOM_ALIGN": "alignment 64",
    "DATA_NOT_ENOUGH_DATA": "data cut by one byte",
    "DATA_BAD_ALIGN": "alignment as string",
    "DATA_INCONSISTENT_ALIGN": "offsets of half the alignment",
    "DATA_MEM_SIZE_OVERFLOW": "exabyte tensor",
    "DATA_SUCCESS": "two tensors",
    "DATA_CUSTOM_ALIGN": "alignment 1",
}

# what gguf 0.19's GGUFReader takes without a word
TAKEN_BY_THE_GGUF_PACKAGE = (
    "empty key",
    "array of arrays",
    "tensor name of 65 bytes",
    "tensor name with ../",
    "five dimensions",
    "offset that wraps",
    "unaligned offset",
    "overlapping tensors",
)
