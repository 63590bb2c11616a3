"""Train or assemble the small teachers of the demo and the tests."""
