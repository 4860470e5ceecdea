"""A site's identity key: made once, readable by its owner only."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.secure_sum.identity import format_public_key, is_signed, read_identity, write_identity
from common.types import BadInput


def test_a_key_is_written_once_and_read_again(tmp_path: Path) -> None:
    key = write_identity(tmp_path / "identity")
    assert (tmp_path / "identity").stat().st_mode & 0o777 == 0o600
    again = read_identity(tmp_path / "identity")
    public = format_public_key(key)
    assert len(public) == 64
    assert is_signed(public, again.sign(b"text"), b"text")
    assert not is_signed(public, again.sign(b"text"), b"another")
    with pytest.raises(BadInput, match="never overwritten"):
        write_identity(tmp_path / "identity")


def test_what_is_no_private_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity"
    with pytest.raises(BadInput, match="expected this site's identity key"):
        read_identity(path)
    path.write_text("no key")
    path.chmod(0o600)
    with pytest.raises(BadInput, match="without a passphrase"):
        read_identity(path)
    path.unlink()
    write_identity(path)
    path.chmod(0o640)
    with pytest.raises(BadInput, match="chmod 600"):
        read_identity(path)


@pytest.mark.parametrize("public", ["", "zz" * 32, "00" * 31, "ff" * 32])
def test_a_public_key_that_is_none_signs_nothing(public: str, tmp_path: Path) -> None:
    assert not is_signed(public, write_identity(tmp_path / "identity").sign(b"text"), b"text")
