"""The Hub of these tests, seen by the genuine client: what goes up comes down, over LFS in parts and over Xet."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.server import TOKEN, Hub

CLIENT = """
import os, sys
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download
folder, api = Path(sys.argv[1]), HfApi()
api.create_repo("me/m", private=True)
api.create_repo("me/m", private=True, exist_ok=True)
first = api.upload_folder(repo_id="me/m", folder_path=folder, commit_message="one").oid
api.create_tag("me/m", tag="v1")
(folder / "config.json").write_text('{"a": 2}')
pull = api.upload_folder(repo_id="me/m", folder_path=folder, commit_message="two", create_pr=True)
info = api.model_info("me/m", revision="v1", files_metadata=True)
assert info.sha == first and info.private, (info.sha, first)
place = Path(snapshot_download("me/m", revision=pull.pr_revision))
for path in folder.rglob("*"):
    assert path.is_dir() or (place / path.relative_to(folder)).read_bytes() == path.read_bytes(), path
print(os.path.basename(os.readlink(place / "model.safetensors")))
"""


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_what_the_client_pushes_it_pulls(tmp_path: Path, xet: bool) -> None:
    if xet:
        pytest.importorskip("hf_xet")
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    raw = random.Random(2).randbytes(1_500_000)
    (folder / "model.safetensors").write_bytes(raw)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "sub" / "notes.txt").write_text("x")
    with Hub(tmp_path / "hub", xet=xet) as hub:
        hub.multipart = 600_000
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, str(folder)],
            env=hub.env(tmp_path / "home", TOKEN),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        repo = hub.repo("me/m")
        assert hub.content("me/m", "model.safetensors") == raw
        assert done.stdout.split()[-1] == repo.head.files["model.safetensors"].oid
        assert hub.content("me/m", "config.json", "refs/pr/1") == b'{"a": 2}' != hub.content("me/m", "config.json")
        uploads = hub.requests("PUT", "/upload/")
        assert len(uploads) == (0 if xet else 3)
        assert bool(hub.requests("GET", "xet-write-token")) == xet
        assert not hub.leaked()
        assert os.path.exists(hub.folder / "cas" / "xet") == xet
