"""The list of faults in mutants.py can still be put into the code. `python tests/mutants.py` tries them."""
import pytest

from mutants import FAULTS, REPO, TESTS, arguments_of

@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.old[:40]}")
def test_a_fault_changes_one_place_of_a_file(fault):
    assert (REPO / fault.file).read_text().count(fault.old) == 1 and fault.new != fault.old


def test_there_are_many_faults_none_comes_twice_and_few_need_a_slow_test():
    assert len(FAULTS) >= 65 and len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)
    assert sum(bool(fault.slow) for fault in FAULTS) <= 6


def test_the_arguments_of_every_file_exist():
    assert all((REPO / "tests" / name).is_file() for names in TESTS.values() for name in names)
    assert all(fault.file in TESTS and arguments_of(fault) for fault in FAULTS)
