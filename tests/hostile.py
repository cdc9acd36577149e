"""Data sets as someone would write them who means harm: the digit shards with other names, numbers and shapes."""

import json

from toolkit.data.index import ShardIndex, index_path, read_index


def changed_index(source, **values):
    """The train split's index of the folder `source` with other columns or facts."""
    index = read_index(source, index_path(source, "train"))
    return ShardIndex(**{key: getattr(index, key) for key in index.__dataclass_fields__} | values)


def change_info(folder, change):
    """Let `change` edit what `_info.json` of `folder` holds."""
    info = json.loads((folder / "_info.json").read_text())
    change(info)
    (folder / "_info.json").write_text(json.dumps(info))


def rename_shards(folder, names, *, in_info=True, hashed=True):
    """Other names for the train split's shards in its index and `_info.json`; the files themselves stay."""
    sha256 = changed_index(folder, names=tuple(names)).save(index_path(folder, "train"))
    entry = {"index_sha256": sha256 if hashed else None, **({"filenames": names} if in_info else {})}
    change_info(folder, lambda info: info["splits"]["train"].update(entry))


def snapshot(folder, without):
    """What lies in `folder` beside the folder `without`: path -> (time of change, content)."""
    return {
        path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
        if without != path and without not in path.parents and path not in without.parents
    }
