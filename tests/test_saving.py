import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_efficiency.saving import check_output, save_checkpoint, staged_folder

ROOT = Path(__file__).parent.parent


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_saves_a_whole_checkpoint(tiny_llama, tiny_tokenizer, tmp_path):
    out = save_checkpoint(tiny_llama, tiny_tokenizer, tmp_path / "a" / "b", {"README.md": "héllo", "x.png": b"\x89"})
    back = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(back.lm_head.weight, tiny_llama.lm_head.weight)
    assert AutoTokenizer.from_pretrained(out)("text").input_ids == tiny_tokenizer("text").input_ids
    assert (out / "README.md").read_text(encoding="utf-8") == "héllo"
    assert (out / "x.png").read_bytes() == b"\x89"
    assert entries(out.parent) == ["b"]


def test_overwriting_replaces_the_whole_folder(tiny_llama, tmp_path):
    out = save_checkpoint(tiny_llama, None, tmp_path / "m", {"old.json": "{}"})
    save_checkpoint(tiny_llama, None, out, {"new.json": "{}"}, overwrite=True)
    assert "old.json" not in entries(out)
    assert "new.json" in entries(out)
    assert entries(tmp_path) == ["m"]


class FullDisk:
    """Writes half of a file and then fails as a full disk does."""

    def save_pretrained(self, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("exists", [True, False])
def test_full_disk_leaves_the_old_folder_and_nothing_else(exists, tmp_path):
    out = tmp_path / "m"
    if exists:
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(FullDisk(), None, out, overwrite=True)
    assert entries(tmp_path) == (["m"] if exists else [])
    if exists:
        assert (out / "model.safetensors").read_bytes() == b"old"


def test_failing_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    out = tmp_path / "m"
    out.mkdir()
    (out / "config.json").write_text("old")
    rename = Path.rename

    def fail_into_place(self, target):
        if ".new-" in self.name:
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(PermissionError), staged_folder(out) as staging:
        (staging / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "old"
    assert entries(tmp_path) == ["m"]


def test_kill_half_way_leaves_the_old_folder(tmp_path):
    """SIGKILL in the middle of writing; the next save clears the leftover away."""
    out = tmp_path / "m"
    out.mkdir()
    (out / "config.json").write_text("old")
    script = (
        "import sys, time\nfrom hf_efficiency.saving import staged_folder\n"
        "with staged_folder(sys.argv[1]) as staging:\n"
        "    (staging / 'config.json').write_text('half')\n"
        "    print('writing', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (out / "config.json").read_text() == "old"
    assert len(entries(tmp_path)) == 2
    with staged_folder(out) as staging:
        (staging / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new"
    assert entries(tmp_path) == ["m"]


def test_kill_between_the_renames_is_undone_by_the_next_call(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    aside = tmp_path / f".m.old-{int(gone.stdout)}"
    aside.mkdir()
    (aside / "config.json").write_text("old")
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "m"):
        raise RuntimeError
    assert (tmp_path / "m" / "config.json").read_text() == "old"


def test_leftover_of_a_running_process_is_left_alone(tmp_path):
    other = tmp_path / f".m.new-{os.getppid()}"
    other.mkdir()
    with staged_folder(tmp_path / "m"):
        pass
    assert other.exists()


def test_keep_existing(tmp_path):
    out = tmp_path / "m"
    with staged_folder(out, keep_existing=True) as staging:
        (staging / "a").write_text("ours")
        out.mkdir()
        (out / "a").write_text("theirs")
    assert (out / "a").read_text() == "theirs"
    assert entries(tmp_path) == ["m"]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", ["thesis.docx", "src/", ".git/", "model.safetensors.py"])
def test_foreign_folders_are_never_overwritten(name, overwrite, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=f"{name.strip('/')}', which is no part of a checkpoint"):
        check_output(tmp_path, overwrite=overwrite)


def test_folder_with_a_checkpoint_needs_overwrite(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"):
        check_output(tmp_path)
    assert check_output(tmp_path, overwrite=True) == tmp_path


def test_output_is_a_file(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        check_output(tmp_path / "f")
