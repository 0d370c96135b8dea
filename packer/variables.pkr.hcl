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
  description = "SHA-256 digest of all inputs of the image, in hexadecimal."
  validation {
    condition     = regex_replace(var.image_digest, "^[0-9a-f]{64}$", "") == "" && var.image_digest != ""
    error_message = "The image_digest must be 64 hexadecimal digits."
  }
}

variable "run_id" {
  type        = string
  description = "Id of the run, with which every resource is tagged."
  validation {
    condition     = length(var.run_id) > 0
    error_message = "The run_id must not be empty."
  }
}

variable "uploads" {
  type        = list(string)
  description = "Files to upload: guest.tar with the guest's files, and perhaps the container archive."
  validation {
    condition     = length(var.uploads) > 0
    error_message = "The uploads must have guest.tar."
  }
}

variable "packages" {
  type        = list(string)
  description = "Packages besides Docker; installed if the base does not have them."
  default     = []
}

variable "container_reference" {
  type        = string
  description = "Name of the Dask container's image."
  validation {
    condition     = length(var.container_reference) > 0
    error_message = "The container_reference must not be empty."
  }
}

variable "container_archive" {
  type        = string
  description = "Path of the container archive on the building machine; empty to pull the reference."
  default     = ""
}

variable "insecure_registry" {
  type        = string
  description = "host:port of a registry without TLS, during the build only; empty for none."
  default     = ""
}

variable "records_directory" {
  type        = string
  description = "Folder on this host for the records of 20-container.sh: packages.txt and identity.txt."
}

variable "manifest_file" {
  type        = string
  description = "Path of Packer's manifest of this run."
}

variable "ssh_username" {
  type        = string
  description = "Login user of the base."
}

variable "ssh_private_key_file" {
  type        = string
  description = "An ed25519 key of this run (Packer 1.6 makes SHA-1 signatures with RSA keys)."
}

variable "ssh_timeout" {
  type        = string
  description = "How long to wait for ssh, such as 10m."
  default     = "10m"
  validation {
    condition     = regex_replace(var.ssh_timeout, "^[0-9]+[smh]$", "") == "" && var.ssh_timeout != ""
    error_message = "The ssh_timeout must be a number with s, m or h."
  }
}

variable "base_disk" {
  type        = string
  description = "qemu: the base disk image; Packer requires a value even if it is not used."
  default     = "/dev/null"
}

variable "disk_size" {
  type        = string
  description = "qemu: size of the image's disk, in MiB with the suffix M."
  default     = "8192M"
  validation {
    condition     = regex_replace(var.disk_size, "^[0-9]+M$", "") == "" && var.disk_size != ""
    error_message = "The disk_size must be whole MiB, such as 8192M."
  }
}

variable "output_directory" {
  type        = string
  description = "qemu: folder of the finished disk, which must not exist."
  default     = "output"
}

variable "accelerator" {
  type        = string
  description = "qemu: kvm or tcg."
  default     = "tcg"
  validation {
    condition     = contains(["kvm", "tcg"], var.accelerator)
    error_message = "The accelerator must be kvm or tcg."
  }
}

variable "memory_mib" {
  type        = number
  description = "qemu: memory of the building VM, in MiB."
  default     = 2048
  validation {
    condition     = var.memory_mib >= 512
    error_message = "The memory_mib must be at least 512."
  }
}

variable "cpus" {
  type        = number
  description = "qemu: CPUs of the building VM."
  default     = 2
  validation {
    condition     = var.cpus >= 1
    error_message = "The cpus must be at least 1."
  }
}

variable "qemu_args" {
  type        = list(list(string))
  description = "qemu: further arguments (boot method, console log, the container archive as a disk)."
  default     = []
}

variable "region" {
  type        = string
  description = "amazon-ebs: region of the build."
  default     = "us-east-1"
}

variable "endpoint" {
  type        = string
  description = "amazon-ebs: address of an EC2 API other than AWS's (AWS_ENDPOINT_URL)."
  default     = ""
}

variable "poll_seconds" {
  type        = number
  description = "amazon-ebs: seconds between two requests for a state."
  default     = 5
  validation {
    condition     = var.poll_seconds >= 1
    error_message = "The poll_seconds must be at least 1."
  }
}

variable "ami_name" {
  type        = string
  description = "amazon-ebs: the AMI's name; it contains the run's id, so that the AMI can be found without a tag."
  default     = "ami-builder"
}

variable "tags" {
  type        = map(string)
  description = "amazon-ebs: tags of the AMI and its snapshots."
  default     = {}
}

variable "run_tags" {
  type        = map(string)
  description = "amazon-ebs: tags of resources that exist only during the build."
  default     = {}
}

variable "source_ami" {
  type        = string
  description = "amazon-ebs: the source AMI, resolved before the build."
  default     = "ami-00000000000000000"
  validation {
    condition     = regex_replace(var.source_ami, "^ami-[0-9a-f]+$", "") == "" && var.source_ami != ""
    error_message = "The source_ami must be an AMI id."
  }
}

variable "instance_type" {
  type        = string
  description = "amazon-ebs: type of the building instance."
  default     = "m6i.large"
}

variable "spot" {
  type        = bool
  description = "amazon-ebs: whether the building instance is a spot instance."
  default     = false
}

variable "subnet_id" {
  type        = string
  description = "amazon-ebs: subnet of the building instance; empty for the default VPC."
  default     = ""
}

variable "security_group_id" {
  type        = string
  description = "amazon-ebs: the run's security group; Packer's temporary one would be open to every address."
  default     = "sg-00000000000000000"
  validation {
    condition     = regex_replace(var.security_group_id, "^sg-[0-9a-f]+$", "") == "" && var.security_group_id != ""
    error_message = "The security_group_id must be the id of a security group."
  }
}

variable "instance_profile" {
  type        = string
  description = "amazon-ebs: instance profile; empty for none."
  default     = ""
}

variable "ssh_interface" {
  type        = string
  description = "amazon-ebs: session_manager, or empty to connect to the instance's address."
  default     = ""
  validation {
    condition     = contains(["", "session_manager"], var.ssh_interface)
    error_message = "The ssh_interface must be empty or session_manager."
  }
}

variable "ssh_port" {
  type        = number
  description = "Port of ssh."
  default     = 22
}

variable "user_data_file" {
  type        = string
  description = "amazon-ebs: user data with the login key, and a timer that terminates a lost instance."
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
