"""Tensors kept in memory and in a folder: nothing is lost, budgets hold."""

import torch

from trainer.callbacks.tensor_cache import CacheEntry, DiskCache, MemoryCache


def test_narrowing_loses_nothing():
    exact, odd = torch.randn(5).bfloat16().float(), torch.randn(5)
    strange = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    tensors = {"exact": exact, "odd": odd, "strange": strange, "zeros": torch.tensor([-0.0]), "key": torch.arange(3)}
    narrow = CacheEntry(tensors).narrow()
    assert narrow.tensors["exact"].dtype == torch.bfloat16 and narrow.tensors["odd"].dtype == torch.float32
    back = narrow.widen().tensors
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def test_the_folders_budget_holds(tmp_path):
    folder = DiskCache(tmp_path, 100)
    kept = CacheEntry({"x": torch.zeros(10, dtype=torch.int64)})  # 80 bytes
    folder.put("a", kept)
    folder.put("b", kept)
    assert folder.get("a") is not None and folder.get("b") is None and len(list(tmp_path.iterdir())) == 1


def test_the_memorys_budget_holds():
    memory, kept = MemoryCache(100), CacheEntry({"x": torch.zeros(10, dtype=torch.int64)})
    memory.put("a", kept)
    memory.put("b", kept)
    assert memory.get("a") is kept and memory.get("b") is None and memory.nbytes == 80


def test_a_file_gives_back_tensors_and_facts(tmp_path):
    tensors = {"half": torch.randn(3, 2).bfloat16().float(), "odd": torch.randn(4), "key": torch.arange(3)}
    kept = CacheEntry(tensors, {"grid": (1, 2, 3)}).narrow()
    DiskCache(tmp_path, 1000).put("a", kept)
    back = DiskCache(tmp_path, 0).get("a")
    assert back.facts == {"grid": [1, 2, 3]} and back.tensors["half"].dtype == torch.bfloat16
    for name, tensor in back.widen().tensors.items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name]), name
    assert DiskCache(tmp_path, 0).get("b") is None
