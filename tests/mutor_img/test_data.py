"""The data order has no state, and visits every image once an epoch."""

import numpy as np

from mutor_img.data import StatelessOrder


def test_an_epoch_visits_every_item_once():
    items, epochs = StatelessOrder(37, seed=3).items(np.arange(74))
    assert sorted(items[:37]) == sorted(items[37:]) == list(range(37))
    assert (epochs == np.repeat([0, 1], 37)).all()


def test_epochs_and_seeds_have_different_orders():
    order = StatelessOrder(100, seed=0)
    first, second = order.items(np.arange(100))[0], order.items(np.arange(100, 200))[0]
    assert (first != second).any() and (first != StatelessOrder(100, seed=1).items(np.arange(100))[0]).any()


def test_items_depend_on_the_sample_number_alone():
    whole = StatelessOrder(11, seed=5).items(np.arange(60))[0]
    order = StatelessOrder(11, seed=5)
    numbers = np.random.default_rng(0).permutation(60)
    assert all(order.items(np.array([n]))[0][0] == whole[n] for n in numbers)
