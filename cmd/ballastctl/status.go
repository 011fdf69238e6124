package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/spf13/cobra"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
)

// statusView is what `status -o json` shows.
type statusView struct {
	Version       string             `json:"version"`
	Node          string             `json:"node"`
	StartedAt     *time.Time         `json:"startedAt,omitempty"`
	Ready         bool               `json:"ready"`
	Message       string             `json:"message,omitempty"`
	Nodes         int                `json:"nodes"`
	Volumes       int                `json:"volumes"`
	Attached      int                `json:"attached"`
	Snapshots     int                `json:"snapshots"`
	LogicalBytes  int64              `json:"logicalBytes"`
	UsedBytes     int64              `json:"usedBytes"`
	CapacityBytes int64              `json:"capacityBytes"`
	Unhealthy     []volumeHealthView `json:"unhealthy"`
	// UnhealthySnapshots are those with conditions.
	UnhealthySnapshots []snapshotView `json:"unhealthySnapshots,omitempty"`
}

type volumeHealthView struct {
	Volume     string          `json:"volume"`
	Conditions []conditionView `json:"conditions"`
}

func clusterStatus(ctx context.Context, a adminpb.AdminClient) (statusView, error) {
	v, err := a.Version(ctx, &adminpb.VersionRequest{})
	if err != nil {
		return statusView{}, err
	}
	if len(v.Controllers) > 0 {
		return statusView{}, notController(v)
	}
	h, err := a.Health(ctx, &adminpb.HealthRequest{})
	if err != nil {
		return statusView{}, err
	}
	s := statusView{
		Version:   v.Version,
		Node:      v.Node,
		StartedAt: timeView(v.StartedAt),
		Ready:     h.Ready,
		Message:   h.Message,
		Unhealthy: views(h.Volumes, func(h *adminpb.VolumeHealth) volumeHealthView {
			return volumeHealthView{Volume: h.Volume, Conditions: views(h.Conditions, viewCondition)}
		}),
	}
	if !s.Ready {
		return s, nil
	}
	ns, err := a.ListNodes(ctx, &adminpb.ListNodesRequest{})
	if err != nil {
		return statusView{}, err
	}
	s.Nodes = len(ns.Nodes)
	for _, n := range views(ns.Nodes, viewNode) {
		used, capacity := nodeTotals(n)
		s.UsedBytes += used
		s.CapacityBytes += capacity
	}
	vs, err := listVolumes(ctx, a, "", false)
	if err != nil {
		return statusView{}, err
	}
	s.Volumes = len(vs)
	for _, v := range vs {
		s.LogicalBytes += v.SizeBytes
		if v.Attachment != nil {
			s.Attached++
		}
	}
	ss, err := listSnapshots(ctx, a, "")
	s.Snapshots = len(ss)
	for _, x := range ss {
		if len(x.Conditions) > 0 {
			s.UnhealthySnapshots = append(s.UnhealthySnapshots, x)
		}
	}
	return s, err
}

func statusCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Say in a few lines how the cluster is",
		Long: `Say in a few lines how the cluster is: whether the daemon is ready, what is stored, and which volumes are not well. The
exit code is 4 while the daemon is not ready. ` + "`cluster status`" + ` says more of controllers and nodes.`,
		Example: "  ballastctl status\n  ballastctl status -o json | jq .ready",
		Args:    arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
				s, err := clusterStatus(ctx, a)
				if err != nil {
					return err
				}
				var notReady error
				if !s.Ready {
					notReady = unreachableError{fmt.Errorf("the daemon is not ready: %s", s.Message)}
				}
				if !c.forPeople() {
					return errors.Join(c.data(s), notReady)
				}
				ready := cell{"ready", styleGood}
				if !s.Ready {
					ready = cell{"not ready: " + s.Message, styleBad}
				}
				fs := []field{
					{"Daemon", ready},
					{"Version", plain(fmt.Sprintf("%s on %s, up %s", s.Version, s.Node, ageText(s.StartedAt, now())))},
				}
				if s.Ready {
					fs = append(fs,
						field{"Nodes", plain(fmt.Sprint(s.Nodes))},
						field{"Volumes", plain(fmt.Sprintf("%d, %d attached, %s in all", s.Volumes, s.Attached, sizeText(s.LogicalBytes)))},
						field{"Snapshots", plain(fmt.Sprint(s.Snapshots))},
						field{"Space", plain(fmt.Sprintf("%s of %s used", sizeText(s.UsedBytes), sizeText(s.CapacityBytes)))},
						field{"", meter(s.UsedBytes, s.CapacityBytes)},
					)
				}
				for _, h := range s.Unhealthy {
					fs = append(fs, field{"Unhealthy", cell{h.Volume + ": " + healthCell(h.Conditions).text, healthCell(h.Conditions).style}})
				}
				for _, x := range s.UnhealthySnapshots {
					fs = append(fs, field{"Unhealthy", cell{"snapshot " + x.Name + ": " + healthCell(x.Conditions).text, healthCell(x.Conditions).style}})
				}
				return errors.Join(c.describe(fs), notReady)
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
}

type versionView struct {
	Client buildView  `json:"client"`
	Daemon *buildView `json:"daemon,omitempty"`
}

type buildView struct {
	Version string `json:"version"`
	Go      string `json:"go"`
}

func versionCommand(c *cli) *cobra.Command {
	var clientOnly bool
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Show the versions of ballastctl and of the daemon",
		Example: "  ballastctl version\n  ballastctl version --client",
		Args:    arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := versionView{Client: buildView{Version: version, Go: runtime.Version()}}
			var daemonErr error
			if !clientOnly {
				daemonErr = c.call(cmd, func(ctx context.Context, a adminpb.AdminClient) error {
					r, err := a.Version(ctx, &adminpb.VersionRequest{})
					if err != nil {
						return err
					}
					v.Daemon = &buildView{Version: r.Version, Go: r.GoVersion}
					return nil
				})
			}
			if !c.forPeople() {
				if err := c.data(v); err != nil {
					return err
				}
				return daemonErr
			}
			if err := c.say("ballastctl  %s (%s)", v.Client.Version, v.Client.Go); err != nil {
				return err
			}
			if v.Daemon != nil {
				return c.say("ballastd    %s (%s)", v.Daemon.Version, v.Daemon.Go)
			}
			return daemonErr
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().BoolVar(&clientOnly, "client", false, "only that of ballastctl")
	return cmd
}
