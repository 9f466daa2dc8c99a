"""Names of the files that training leaves in a run folder; `launch.run_folder.RunFolder` knows all of a folder.

Imports nothing: commands that only look at a run must not wait for torch.
"""

#: Folder of checkpoints; the one that a run goes on from; the one before it, kept for when the last is damaged.
CHECKPOINTS, LAST, PREVIOUS = "checkpoints", "last.ckpt", "previous.ckpt"
#: The retrained blocks, written when training ends.
GRAFT = "graft.safetensors"
#: Hashes of the frozen weights before and after training.
FINGERPRINT = "fingerprint.json"
#: Folders of what callbacks measure: KIND-STAGE.npz, and KIND-STAGE.png drawn from it.
MEASUREMENTS, FIGURES = "measurements", "figures"
