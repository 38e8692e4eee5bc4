"""relu_mlp against float64, every option and dtype."""

import pytest
from helpers import DTYPES, check_against_float64
from operations import cases_of

pytestmark = pytest.mark.numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_float64(dtype):
    for case in cases_of("relu_mlp", dtype):
        try:
            check_against_float64(case.ours, case.reference, case.inputs)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
