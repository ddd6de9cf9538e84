"""The tests of cbackup: black-box tests that drive the real program through its contract.

Run all with `python3 -m unittest` from the project's top, or one file with `python3 -m unittest tests.test_restore`.
"""
