"""`ami-builder selftest`: the whole life of an AMI in a real account, compared with the loopback cloud's."""
