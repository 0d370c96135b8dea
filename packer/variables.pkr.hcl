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
  description = "Files to upload: guest.tar with the guest's files, and perhaps the container archive, or its recipe."
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

variable "container_recipe" {
  type        = string
  description = "Path of the recipe of that archive, which is then built on the building machine; empty for none."
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
