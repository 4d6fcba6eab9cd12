from app.ops.exit_notice import exit_notice


def test_an_expected_end_says_where_to_look_and_that_tensorboard_stays():
    """Finished and refused alike: nothing starts again."""
    assert exit_notice(True, "http://localhost:6006") == (
        "The trainer has ended; its last lines say why. TensorBoard stays on http://localhost:6006."
    )


def test_an_unexpected_end_says_that_it_goes_on():
    """A kill or a crash is followed by a new start."""
    assert exit_notice(False, "http://localhost:6006") == (
        "The trainer ended unexpectedly and is started again from its last checkpoint."
    )
