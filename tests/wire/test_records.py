"""A packed adapter in a Flower record: one array out, and nothing else let in."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord

from core.errors import AdapterError
from tests.adapter_generators import make_adapter
from wire.codec import pack, unpack
from wire.records import KEY, STYPE, from_record, to_record


def record_of(dtype: str = "uint8", stype: str = STYPE, key: str = KEY) -> ArrayRecord:
    return ArrayRecord({key: Array(dtype=dtype, shape=(3,), stype=stype, data=b"abc")})


def test_an_adapter_crosses_as_one_array_bit_for_bit() -> None:
    packed = pack(make_adapter(0, {f"layers.{i}.q_proj": (4, 6) for i in range(50)}, 3, 0.5))
    record = to_record(packed)
    assert len(record) == 1
    assert from_record(record) == packed
    assert pack(unpack(from_record(record, limit=len(packed)))) == packed


@pytest.mark.parametrize(
    ("record", "got"),
    [
        (None, "none"),
        (b"abc", "none"),
        (ConfigRecord({KEY: b"abc"}), "none"),
        (ArrayRecord(), r"arrays \[\]"),
        (record_of(key="weights"), r"arrays \['weights'\]"),
        (ArrayRecord([np.zeros(2), np.zeros(3)]), r"arrays \['0', '1'\]"),
    ],
)
def test_anything_but_the_one_array_is_refused(record: object, got: str) -> None:
    with pytest.raises(AdapterError, match=f"expected an ArrayRecord .* 'packed'; got {got}$"):
        from_record(record)


@pytest.mark.parametrize("record", [record_of(dtype="float32"), record_of(stype="numpy.ndarray")])
def test_an_array_of_another_kind_is_refused(record: ArrayRecord) -> None:
    array = record[KEY]
    message = f"bytes of type bouquet.adapter; got '{array.dtype}' of '{array.stype}'"
    with pytest.raises(AdapterError, match=message):
        from_record(record)


def test_more_bytes_than_can_be_needed_are_refused() -> None:
    assert from_record(record_of(), limit=3) == b"abc"
    with pytest.raises(AdapterError, match="3 bytes came where at most 2 can be needed"):
        from_record(record_of(), limit=2)


@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (2**60,)])
def test_a_shape_that_is_not_that_of_the_bytes_is_refused(shape: tuple[int, ...]) -> None:
    array = Array(dtype="uint8", shape=shape, stype=STYPE, data=b"abc")
    with pytest.raises(AdapterError, match=r"3 bytes came under a shape of \("):
        from_record(ArrayRecord({KEY: array}))


def test_names_of_arrays_are_cut_and_escaped() -> None:
    names = ["\x1b[2J" + "x" * 10**6, *map(str, range(9))]
    arrays = {name: Array("uint8", (0,), STYPE, b"") for name in names}
    with pytest.raises(
        AdapterError, match=r"\\x1b\[2Jx{36}', .* \(showing 5 of 10\)\]$"
    ) as refused:
        from_record(ArrayRecord(arrays))
    assert len(str(refused.value)) < 300
