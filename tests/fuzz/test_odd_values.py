"""Each value of a reader's JSON or GGUF metadata, removed or replaced by each odd one: refused by a named
error, or read.

What a fuzzer finds by chance in one run and not in the next is tried here without chance.
"""

from __future__ import annotations

import gguf_values
import mutations
import pytest
from readers import READERS

from hotcold.errors import HotcoldError


@pytest.mark.filterwarnings("error")  # a user would see numpy's
@pytest.mark.parametrize("name", READERS)
def test_no_odd_value_breaks_a_reader(name, tmp_path):
    reader, count = READERS[name], 0
    reader.make(tmp_path)
    good = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for file in reader.files:
        changes = (gguf_values if file.endswith(".gguf") else mutations).one_value_each
        seeds = reader.seeds if file == reader.files[0] else ()
        for seed in (good[tmp_path / file], *seeds):
            for changed in changes(seed):
                (tmp_path / file).write_bytes(changed)
                try:
                    reader.sign(tmp_path)
                    reader.read(tmp_path)
                except HotcoldError as error:  # anything else is a crash
                    assert str(error).isprintable()
                for path, content in good.items():  # `sign` may have changed others
                    if path.read_bytes() != content:
                        path.write_bytes(content)
                count += 1
    assert count > len(mutations.ODD)
