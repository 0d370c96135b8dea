"""ami-builder on the emulated EC2 (tests/fake_ec2): boto3 and Packer are real, AWS is not."""
