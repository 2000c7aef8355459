"""Dense and compressed models on disk, and how transformers and PEFT load them.

In: a folder, a Hub id. Out: an opened dense model (`dense/`), a checkpoint of ours (`files/`), a model that runs
(`transformers/`). Open `dense/model.py` first.
"""
