"""A record's features do not depend on the records beside it, or it is encoded alone; a random backbone is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from client.data.encoding.batches import choose_batch_size, encode_padded
from common.types import BadInput

pytestmark = pytest.mark.usefixtures("two_threads")

INPUTS = torch.randn(11, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def make_convolution() -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    return lambda inputs: net(inputs).detach()


def test_every_batch_has_one_shape_and_the_added_rows_are_cut_off() -> None:
    shapes = []

    def encode(inputs: Tensor) -> Tensor:
        shapes.append(len(inputs))
        return inputs.flatten(1)

    assert torch.equal(encode_padded(encode, INPUTS, 4), INPUTS.flatten(1))
    assert shapes == [4, 4, 4]


@pytest.mark.parametrize("batch_size", [4, 16])
def test_an_ordinary_network_is_encoded_in_batches_and_a_record_has_the_same_bits_anywhere(batch_size: int) -> None:
    encode = make_convolution()
    assert choose_batch_size(encode, INPUTS[:batch_size], batch_size) == batch_size
    whole = encode_padded(encode, INPUTS, batch_size)
    for start in range(11):
        assert torch.equal(encode_padded(encode, INPUTS[start:], batch_size), whole[start:])


@pytest.mark.parametrize(
    "mix",
    [
        lambda inputs: inputs.flatten(1) - inputs.flatten(1).mean(dim=0),
        lambda inputs: inputs.flatten(1) * torch.arange(len(inputs))[:, None],
    ],
    ids=["its neighbours count", "its place counts"],
)
def test_a_network_whose_rows_depend_on_each_other_is_encoded_record_by_record(mix: Callable[[Tensor], Tensor]) -> None:
    assert choose_batch_size(mix, INPUTS[:8], 8) == 1


def test_a_network_that_gives_no_numbers_to_try_it_on_encodes_record_by_record() -> None:
    assert choose_batch_size(lambda inputs: inputs.flatten(1) - torch.inf + torch.inf, INPUTS[:8], 8) == 1


def test_a_network_that_is_random_in_evaluation_mode_is_refused_in_one_sentence() -> None:
    with pytest.raises(BadInput, match="same features each time") as caught:
        choose_batch_size(lambda inputs: inputs.flatten(1) * torch.rand(1), INPUTS, 16)
    assert "\n" not in str(caught.value)
