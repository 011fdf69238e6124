# Ballast as a CSI plugin on one client: controller and node in one task. Needs, on the clients, the docker driver with
# plugin "docker" { config { allow_privileged = true  volumes { enabled = true } } }.
#
#   nomad job run ballast.nomad.hcl
#   nomad plugin status ballast
#   nomad volume create volume.hcl
job "ballast" {
  datacenters = ["*"]
  type        = "service"

  # The node whose disks hold the volumes; set the metadata on that client.
  constraint {
    attribute = "${meta.ballast}"
    value     = "true"
  }

  group "ballast" {
    count = 1

    # A restart takes the devices of running workloads away for its duration: never by itself for an update.
    update {
      max_parallel = 0
    }

    task "ballastd" {
      driver       = "docker"
      kill_timeout = "30s"

      csi_plugin {
        id        = "ballast"
        type      = "monolith"
        mount_dir = "/csi" # Nomad sets CSI_ENDPOINT to the socket in it
      }

      config {
        image      = "ballast:v0.1.0"
        privileged = true
        args = [
          "--node-id=${node.unique.name}",
          "--stop-timeout=20s",
        ]
        mount {
          type   = "bind"
          source = "/var/lib/ballast"
          target = "/var/lib/ballast"
        }
        mount {
          type   = "bind"
          source = "/run/ballast"
          target = "/run/ballast"
          bind_options {
            propagation = "rshared"
          }
        }
        mount {
          type   = "bind"
          source = "/dev"
          target = "/dev"
        }
      }

      resources {
        cpu    = 200
        memory = 256
      }
    }
  }
}
