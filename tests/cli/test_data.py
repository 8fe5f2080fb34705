"""What a command reads: files, axes and channels."""

import json
from pathlib import Path

import pytest

from unmurk.cli.data import selection_of
from unmurk.errors import InputError
from unmurk.io.axes import Selection


def test_channels_of_a_run_concern_files_with_more_channels(tmp_path):
    """A file of the channel alone is read as it is, unless the user names a channel."""
    (tmp_path / "config.json").write_text(json.dumps({"problem": {}, "channels": ["GFP"]}))

    class Given:
        axes, channel = None, ()

    select, file = selection_of(Given(), tmp_path), Path("a.tif")
    assert select.chosen(file, 1) == [0]
    assert select.chosen(file, 2, ["DAPI", "GFP"]) == [1]
    with pytest.raises(InputError, match="none is 'GFP'"):
        select.chosen(file, 2)
    Given.channel = ("1",)
    with pytest.raises(InputError, match="1 channels"):
        selection_of(Given(), tmp_path).chosen(file, 1)
    assert Selection(channels=("1",)).chosen(file, 2) == [1]
