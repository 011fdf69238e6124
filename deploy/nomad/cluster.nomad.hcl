# One node of a cluster, on one client: a job for each, so that each is updated by itself, when it is drained. Nodes know each
# other by the client's address, which must stay. The first begins the cluster; see docs/orchestrators.md.
#
#   nomad job run -var client=client-1 -var plugin=monolith cluster.nomad.hcl
#   nomad job run -var client=client-2 -var plugin=monolith -var controllers=10.0.0.1:9820 -var join=ballast-join-... cluster.nomad.hcl
variable "client" {
  type        = string
  description = "the client's name"
}

variable "plugin" {
  type        = string
  default     = "node"
  description = "monolith on the controllers, node on the others"
}

variable "controllers" {
  type        = string
  default     = ""
  description = "the controllers' addresses, host:port with commas between; none begins a cluster where there is none on the client's disk"
}

variable "join" {
  type        = string
  default     = ""
  description = "the token; a node that has joined needs none"
}

job "ballast" {
  id          = "ballast-${var.client}"
  name        = "ballast-${var.client}"
  datacenters = ["*"]
  type        = "service"

  constraint {
    attribute = "${node.unique.name}"
    value     = var.client
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
        type      = var.plugin
        mount_dir = "/csi" # Nomad sets CSI_ENDPOINT to the socket in it
      }

      config {
        image        = "ballast:v0.1.0"
        privileged   = true
        network_mode = "host"
        args = [
          "--node-id=${node.unique.name}",
          "--listen=${attr.unique.network.ip-address}:9820",
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

      # An empty one is as if it were not there.
      env {
        BALLAST_CONTROLLERS = var.controllers
        BALLAST_JOIN        = var.join
      }

      resources {
        cpu    = 200
        memory = 256
      }
    }
  }
}
