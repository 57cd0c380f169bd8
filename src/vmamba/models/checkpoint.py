from __future__ import annotations


def checkpoint_filter_fn(state_dict, model):
    raise NotImplementedError
