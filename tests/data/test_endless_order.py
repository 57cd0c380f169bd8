"""Images going round without end, cut into epochs of so many steps."""

import torch

from vmamba.data.loading import EndlessOrder, epoch_order, resumable_loader


def test_epochs_follow_one_another_through_whole_permutations():
    order = epoch_order(7, batch_size=2, seed=3, steps=5)
    assert len(order) == 10
    taken = []
    for epoch in range(7):
        order.set_epoch(epoch)
        taken += list(order)
    for number in range(10):
        assert sorted(index for n, index in taken if n == number) == list(range(7))
    assert [n for n, _ in taken] == [place // 7 for place in range(70)]
    assert [i for n, i in taken if n == 0] != [i for n, i in taken if n == 1]


def test_processes_share_a_step_and_a_resume_skips_what_was_taken():
    whole = epoch_order(7, batch_size=6, seed=3, steps=4)
    shares = [epoch_order(7, batch_size=3, seed=3, rank=rank, world=2, steps=4) for rank in (0, 1)]
    for order in (whole, *shares):
        order.set_epoch(2)
    wanted = list(whole)
    assert len(shares[0]) == len(shares[1]) == 12
    assert [pair for both in zip(*shares, strict=True) for pair in both] == wanted
    for order in shares:
        order.skip = 5
    assert [pair for both in zip(*shares, strict=True) for pair in both] == wanted[10:]


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return index, torch.rand(())


def test_an_image_that_comes_twice_in_an_epoch_is_drawn_afresh_and_the_same_after_a_resume():
    loader = resumable_loader(Numbers(), batch_size=2, workers=0, seed=0, steps=6)
    assert isinstance(loader.sampler, EndlessOrder)
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    draws = torch.cat([draw for _, draw in batches]).tolist()
    assert len(set(draws)) == 12
    loader.load_state_dict({"epoch": 0, "batches": 4})
    for (index, draw), (wanted_index, wanted_draw) in zip(loader, batches[4:], strict=True):
        assert torch.equal(index, wanted_index)
        assert torch.equal(draw, wanted_draw)
