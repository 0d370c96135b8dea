# ami-builder writes the values of a run beside these files, as run.auto.pkrvars.json.
# Packer 1.6 has no regex(): `regex_replace(value, pattern, "") == ""` is its whole match.

variable "image_name" {
  type        = string
  description = "Name of the image in ami-builder.toml."
  validation {
    condition     = regex_replace(var.image_name, "^[a-z0-9][a-z0-9-]*$", "") == "" && var.image_name != ""
    error_message = "The image_name must be of lower-case letters, digits and hyphens."
  }
}

variable "image_digest" {
  type        = string
  description = "Digest of everything that goes into the image, sha256 in hexadecimal."
  validation {
    condition     = regex_replace(var.image_digest, "^[0-9a-f]{64}$", "") == "" && var.image_digest != ""
    error_message = "The image_digest must be 64 hexadecimal digits."
  }
}

variable "run_id" {
  type        = string
  description = "The run that every resource is tagged with."
  validation {
    condition     = length(var.run_id) > 0
    error_message = "The run_id must not be empty."
  }
}

variable "uploads" {
  type        = list(string)
  description = "What is brought to the machine: guest.tar with the guest's files, perhaps the container's archive."
  validation {
    condition     = length(var.uploads) > 0
    error_message = "The uploads must have guest.tar."
  }
}

variable "packages" {
  type        = list(string)
  description = "Packages that the image must have besides Docker; installed where the base lacks them."
  default     = []
}

variable "container_reference" {
  type        = string
  description = "Name under which the Dask container's image must be present."
  validation {
    condition     = length(var.container_reference) > 0
    error_message = "The container_reference must not be empty."
  }
}

variable "container_archive" {
  type        = string
  description = "Where the baking machine finds the container's archive; empty to pull the reference."
  default     = ""
}

variable "insecure_registry" {
  type        = string
  description = "A host:port that is pulled from without TLS while baking; empty for none."
  default     = ""
}

variable "records_directory" {
  type        = string
  description = "Where what 20-container.sh wrote down is kept on this machine: packages.txt and identity.txt."
}

variable "manifest_file" {
  type        = string
  description = "Where Packer's manifest of this run is written."
}

variable "ssh_username" {
  type        = string
  description = "Login user of the base."
}

variable "ssh_private_key_file" {
  type        = string
  description = "An ed25519 key made for this run (Packer 1.6 offers SHA-1 signatures for RSA keys)."
}

variable "ssh_timeout" {
  type        = string
  description = "How long the baking machine may take until ssh answers, such as 10m."
  default     = "10m"
  validation {
    condition     = regex_replace(var.ssh_timeout, "^[0-9]+[smh]$", "") == "" && var.ssh_timeout != ""
    error_message = "The ssh_timeout must be a number with s, m or h."
  }
}

variable "base_disk" {
  type        = string
  description = "qemu: the disk image that baking starts from; Packer wants one even where it is not used."
  default     = "/dev/null"
}

variable "disk_size" {
  type        = string
  description = "qemu: size of the image's disk, in MiB with a trailing M."
  default     = "8192M"
  validation {
    condition     = regex_replace(var.disk_size, "^[0-9]+M$", "") == "" && var.disk_size != ""
    error_message = "The disk_size must be whole MiB, such as 8192M."
  }
}

variable "output_directory" {
  type        = string
  description = "qemu: a folder that does not exist yet, for the finished disk."
  default     = "output"
}

variable "accelerator" {
  type        = string
  description = "qemu: kvm or tcg, as found by trying a guest."
  default     = "tcg"
  validation {
    condition     = contains(["kvm", "tcg"], var.accelerator)
    error_message = "The accelerator must be kvm or tcg."
  }
}

variable "memory_mib" {
  type        = number
  description = "qemu: memory of the baking machine, in MiB."
  default     = 2048
  validation {
    condition     = var.memory_mib >= 512
    error_message = "The memory_mib must be at least 512."
  }
}

variable "cpus" {
  type        = number
  description = "qemu: processors of the baking machine."
  default     = 2
  validation {
    condition     = var.cpus >= 1
    error_message = "The cpus must be at least 1."
  }
}

variable "qemu_args" {
  type        = list(list(string))
  description = "qemu: further arguments (how to boot, the console's log, the container's archive as a disk)."
  default     = []
}

variable "region" {
  type        = string
  description = "amazon-ebs: where the AMI is baked."
  default     = "us-east-1"
}

variable "endpoint" {
  type        = string
  description = "amazon-ebs: where EC2's API is, other than at AWS (AWS_ENDPOINT_URL)."
  default     = ""
}

variable "poll_seconds" {
  type        = number
  description = "amazon-ebs: how often EC2 is asked whether something is done."
  default     = 5
  validation {
    condition     = var.poll_seconds >= 1
    error_message = "The poll_seconds must be at least 1."
  }
}

variable "ami_name" {
  type        = string
  description = "amazon-ebs: the AMI's name, which has the run in it, so that it is found without a tag."
  default     = "ami-builder"
}

variable "tags" {
  type        = map(string)
  description = "amazon-ebs: tags of the AMI and its snapshots."
  default     = {}
}

variable "run_tags" {
  type        = map(string)
  description = "amazon-ebs: tags of what only lives while baking."
  default     = {}
}

variable "source_ami" {
  type        = string
  description = "amazon-ebs: the AMI that baking starts from, resolved before the build."
  default     = "ami-00000000000000000"
  validation {
    condition     = regex_replace(var.source_ami, "^ami-[0-9a-f]+$", "") == "" && var.source_ami != ""
    error_message = "The source_ami must be an AMI id."
  }
}

variable "instance_type" {
  type        = string
  description = "amazon-ebs: type of the baking instance."
  default     = "m6i.large"
}

variable "spot" {
  type        = bool
  description = "amazon-ebs: whether the baking instance is a spot instance."
  default     = false
}

variable "subnet_id" {
  type        = string
  description = "amazon-ebs: where the baking instance runs; empty for the default VPC."
  default     = ""
}

variable "security_group_id" {
  type        = string
  description = "amazon-ebs: the run's own security group; Packer's temporary one would be open to the world."
  default     = "sg-00000000000000000"
  validation {
    condition     = regex_replace(var.security_group_id, "^sg-[0-9a-f]+$", "") == "" && var.security_group_id != ""
    error_message = "The security_group_id must be the id of a security group."
  }
}

variable "instance_profile" {
  type        = string
  description = "amazon-ebs: the instance's profile; empty for none."
  default     = ""
}

variable "ssh_interface" {
  type        = string
  description = "amazon-ebs: session_manager to open no port; empty for the instance's address."
  default     = ""
  validation {
    condition     = contains(["", "session_manager"], var.ssh_interface)
    error_message = "The ssh_interface must be empty or session_manager."
  }
}

variable "ssh_port" {
  type        = number
  description = "Where ssh answers."
  default     = 22
}

variable "user_data_file" {
  type        = string
  description = "amazon-ebs: a key to log in with, and the timer that ends a lost instance."
  default     = ""
}

variable "root_device" {
  type        = string
  description = "amazon-ebs: the source AMI's root device."
  default     = "/dev/xvda"
}

variable "volume_size" {
  type        = number
  description = "amazon-ebs: size of the AMI's disk, in GiB."
  default     = 8
}

variable "encrypt" {
  type        = bool
  description = "amazon-ebs: whether the AMI's snapshot is encrypted."
  default     = false
}

variable "kms_key" {
  type        = string
  description = "amazon-ebs: the key that encrypts it; empty for the account's default key."
  default     = ""
}
