"""torch's analysis of Triton kernels, remembered: which launches share one, and that torch gets its own back."""

import types

import pytest
import torch

from innerq_compile.kernels.triton.analysis import NAMES, analyses_remembered, remembered


@pytest.fixture
def analysed():
    """A remembered analysis that returns how often it was made."""
    calls = []

    def analyse(kernel, arguments, descriptors):
        calls.append(kernel)
        return len(calls)

    return remembered(analyse)


class Kernel:
    fn = None


KERNEL = Kernel()
ARGUMENTS = {"x_ptr": torch.zeros(3), "size": 5, "BITS": 3, "scale": 0.5}


def test_launches_that_differ_in_their_tensors_share_an_analysis(analysed):
    assert analysed(KERNEL, ARGUMENTS, {}) == 1
    assert analysed(KERNEL, ARGUMENTS | {"x_ptr": torch.ones(2, 7)}, {}) == 1


@pytest.mark.parametrize(
    "other",
    [{"x_ptr": torch.zeros(3, dtype=torch.float16)}, {"size": 6}, {"BITS": True}, {"BITS": 3.0}, {"scale": 0.25}],
)
def test_other_dtypes_and_numbers_are_analysed_anew(analysed, other):
    analysed(KERNEL, ARGUMENTS | {"BITS": 1}, {})
    before = analysed(KERNEL, ARGUMENTS, {})
    assert analysed(KERNEL, ARGUMENTS | other, {}) == before + 1


def test_so_are_other_kernels_and_descriptors(analysed):
    assert [analysed(kernel, ARGUMENTS, {}) for kernel in (KERNEL, Kernel(), KERNEL)] == [1, 2, 1]
    assert [analysed(KERNEL, ARGUMENTS, {"x_ptr": ()}) for _ in range(2)] == [3, 4]


def test_tuners_around_a_kernel_share_what_their_first_choices_share(analysed):
    def tuner(**choice):
        return types.SimpleNamespace(fn=KERNEL, configs=[types.SimpleNamespace(kwargs=choice)])

    assert [analysed(tuner(**choice), ARGUMENTS, {}) for choice in ({}, {}, {"TILE": 8}, {"TILE": 8})] == [1, 1, 2, 2]


def test_torch_gets_its_analysis_back():
    from torch._higher_order_ops import triton_kernel_wrap

    def present():
        return {name: getattr(triton_kernel_wrap, name) for name in NAMES if hasattr(triton_kernel_wrap, name)}

    before = present()
    assert before, f"this torch calls it none of {NAMES}"
    with pytest.raises(RuntimeError, match="as if compiling failed"), analyses_remembered():
        assert all(present()[name] is not before[name] for name in before)
        raise RuntimeError("as if compiling failed")
    assert present() == before


def test_compilations_that_overlap_give_torch_its_analysis_back_with_the_last():
    from torch._higher_order_ops import triton_kernel_wrap

    def now():
        return [getattr(triton_kernel_wrap, name, None) for name in NAMES]

    before, first, second = now(), analyses_remembered(), analyses_remembered()
    first.__enter__()
    during = now()
    second.__enter__()
    first.__exit__(None, None, None)
    assert now() == during != before
    second.__exit__(None, None, None)
    assert now() == before
