build {
  # ami-builder puts the source of one target here.
  sources = []

  provisioner "file" {
    sources = var.uploads
    # Not /tmp, which may be in memory: the container's archive can be among the uploads.
    destination = "/var/tmp/"
  }

  provisioner "shell" {
    execute_command = "sudo -n env {{ .Vars }} sh '{{ .Path }}'"
    environment_vars = [
      "PACKAGES=${join(" ", var.packages)}",
      "CONTAINER_REFERENCE=${var.container_reference}",
      "CONTAINER_ARCHIVE=${var.container_archive}",
      "CONTAINER_RECIPE=${var.container_recipe}",
      "INSECURE_REGISTRY=${var.insecure_registry}",
    ]
    scripts = compact([
      "${path.root}/provisioners/10-guest.sh",
      var.container_recipe != "" ? "${path.root}/provisioners/15-archive.sh" : "",
      "${path.root}/provisioners/20-container.sh",
    ])
  }

  provisioner "file" {
    direction   = "download"
    source      = "/var/tmp/packages.txt"
    destination = "${var.records_directory}/packages.txt"
  }

  # Packer 1.6 gives two sources the same name.
  provisioner "file" {
    direction   = "download"
    source      = "/var/tmp/identity.txt"
    destination = "${var.records_directory}/identity.txt"
  }

  # Last, because it removes what the earlier steps need.
  provisioner "shell" {
    execute_command = "sudo -n env {{ .Vars }} sh '{{ .Path }}'"
    script          = "${path.root}/provisioners/90-clean.sh"
  }

  post-processor "manifest" {
    output     = var.manifest_file
    strip_path = false
    custom_data = {
      image  = var.image_name
      digest = var.image_digest
      run    = var.run_id
    }
  }
}
