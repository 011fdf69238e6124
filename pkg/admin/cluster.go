package admin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/audit"
	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/pki/jointoken"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Cluster is what the admin API needs of this node's place in a cluster. Where the daemon is still starting its methods
// return volume.ErrUnavailable.
type Cluster interface {
	// Controllers lists the controllers and asks each how it is.
	Controllers(ctx context.Context) ([]Controller, error)
	// RemoveController takes the vote from one. volume.ErrNotFound: it is none. ErrInUse: it is the last.
	RemoveController(ctx context.Context, id volume.NodeID) error
	// NewToken makes a join token with the pin of the cluster's CA. It is not kept.
	NewToken() (jointoken.Token, error)
	// Issue certifies a key, a PKCS #10 request in DER, and returns the chain in PEM; lifetime 0 is the usual one.
	Issue(csr []byte, id pki.Identity, lifetime time.Duration) ([]byte, error)
	// Elsewhere lists the controllers that are known where this node is none; it is empty on a controller.
	Elsewhere() []volume.Node
}

// Controller is a controller of the cluster.
type Controller struct {
	ID      volume.NodeID
	Address string
	// Voter tells whether it counts for a majority; one that joins does once it has caught up.
	Voter, Leader bool
	// Answers tells whether it answered just now, Last then how far its log goes.
	Answers bool
	Last    uint64
}

// cluster returns the cluster that this node is part of; volume.ErrInUse where it is alone.
func (s *Service) cluster() (Cluster, error) {
	if s.o.Cluster == nil {
		return nil, fmt.Errorf("node %s is alone: a cluster begins when ballastd is started with --listen HOST:PORT: %w", s.o.Node, volume.ErrInUse)
	}
	return s.o.Cluster, nil
}

// Cluster implements adminpb.AdminServer.
func (s *Service) Cluster(ctx context.Context, _ *adminpb.ClusterRequest) (*adminpb.ClusterReply, error) {
	out := &adminpb.ClusterReply{Alone: s.o.Cluster == nil}
	var attention attention
	if !out.Alone {
		cs, err := s.o.Cluster.Controllers(ctx)
		if err != nil {
			return nil, err
		}
		slices.SortFunc(cs, func(a, b Controller) int { return strings.Compare(string(a.ID), string(b.ID)) })
		for _, c := range cs {
			out.Controllers = append(out.Controllers, &adminpb.Controller{
				Node: string(c.ID), Address: c.Address, Voter: c.Voter, Leader: c.Leader, Answers: c.Answers, LogIndex: c.Last,
			})
		}
		attention.controllers(cs)
	}
	// Without a majority nothing is answered for as long as a read waits, and that is when this is asked.
	brief, cancel := context.WithTimeout(ctx, stateWait)
	defer cancel()
	err := s.kept(brief, out, &attention)
	if err != nil && ctx.Err() == nil && !out.Alone && (errors.Is(err, volume.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded)) {
		return &adminpb.ClusterReply{Controllers: out.Controllers, Unreadable: err.Error(), Attention: attention.lines()}, nil
	}
	if err != nil {
		return nil, err
	}
	out.Attention = attention.lines()
	return out, nil
}

// stateWait bounds how long a look at the cluster waits for its state.
const stateWait = 20 * time.Second

// kept reads what the cluster's state says of nodes and volumes.
func (s *Service) kept(ctx context.Context, out *adminpb.ClusterReply, attention *attention) error {
	nodes, err := s.nodes(ctx)
	if err != nil {
		return err
	}
	out.Nodes = nodes
	unwell, err := s.unwell(ctx)
	if err != nil {
		return err
	}
	err = s.everyVolume(ctx, func(v volume.Volume) bool {
		if v.State != volume.Ready {
			out.Unsettled++
			return true
		}
		for _, r := range v.Replicas {
			if r.Role != volume.InSync {
				out.Resyncing++
			}
		}
		switch worst := worstOf(unwell[v.ID].Conditions); worst {
		case "":
			out.Healthy++
		case volume.Degraded:
			out.Degraded++
			attention.volume(&attention.degraded, v)
		case volume.DataLoss:
			out.DataLoss++
			attention.volume(&attention.lost, v)
		default:
			out.Inaccessible++
			attention.volume(&attention.inaccessible, v)
		}
		return true
	})
	if err != nil {
		return err
	}
	strays, err := s.o.Control.Strays(ctx)
	attention.nodes(nodes)
	attention.strays = len(strays)
	return err
}

func worstOf(cs []volume.Condition) volume.Severity {
	rank := map[volume.Severity]int{volume.Degraded: 1, volume.Inaccessible: 2, volume.DataLoss: 3}
	var worst volume.Severity
	for _, c := range cs {
		if rank[c.Severity] > rank[worst] {
			worst = c.Severity
		}
	}
	return worst
}

// attention collects what needs somebody.
type attention struct {
	quorum                       []string
	lost, inaccessible, degraded []string // volumes
	away, disks, failed          []string
	space, moving                []string
	advice                       []string
	strays                       int
}

func (a *attention) volume(list *[]string, v volume.Volume) { *list = append(*list, v.Name) }

func (a *attention) controllers(cs []Controller) {
	voters, answers, leader := 0, 0, false
	var silent, joining []string
	for _, c := range cs {
		switch {
		case c.Voter && c.Answers:
			voters, answers = voters+1, answers+1
		case c.Voter:
			voters++
			silent = append(silent, string(c.ID))
		default:
			joining = append(joining, string(c.ID))
		}
		leader = leader || c.Leader
	}
	if len(silent) > 0 {
		spare := answers - (voters/2 + 1)
		const see = "See that the host is up and ballastd runs there"
		what := fmt.Sprintf("%d more may fail", spare)
		next := see + "; for one that is gone for good: ballastctl cluster remove-controller " + silent[0]
		switch {
		case spare < 0:
			what, next = "without a majority nothing can be changed, and replicas that fail make I/O wait", see+", with the disk that it had"
		case spare == 0:
			what = "if one more fails nothing can be changed"
		}
		a.quorum = append(a.quorum, fmt.Sprintf("%s not answering (%s): %s. %s", countOf("controller", silent), firstOf(silent), what, next))
	}
	if !leader {
		a.quorum = append(a.quorum, "the controllers have no leader: changes wait until a majority of them answers")
	}
	if len(joining) > 0 {
		a.advice = append(a.advice, fmt.Sprintf("%s without a vote yet: catching up", countOf("controller", joining)))
	}
	if voters == 2 && len(joining) == 0 {
		a.advice = append(a.advice, "2 controllers do not survive the loss of either: make it 3 with ballastctl cluster join-token create --role controller,storage")
	}
}

func (a *attention) nodes(ns []*adminpb.Node) {
	for _, n := range ns {
		switch n.State {
		case nodeSilent:
			a.away = append(a.away, n.Id)
		case string(volume.NodeDrained):
			a.moving = append(a.moving, fmt.Sprintf("node %s is drained: it may be stopped and nothing is placed on it; take that back with ballastctl node undrain %s", n.Id, n.Id))
		case string(volume.NodeEmptying):
			text := fmt.Sprintf("node %s is being emptied: %d replicas and %d snapshots are left", n.Id, n.Replicas, n.Snapshots)
			if n.Replicas+n.Snapshots+n.Attached == 0 {
				text = fmt.Sprintf("node %s is empty: ballastctl node remove %s, or undrain", n.Id, n.Id)
			}
			a.moving = append(a.moving, text)
		}
		for _, p := range n.Pools {
			switch {
			case n.State == nodeSilent:
			case p.CapacityBytes == 0:
				a.disks = append(a.disks, n.Id+"/"+p.Name)
			case p.Failed:
				a.failed = append(a.failed, n.Id+"/"+p.Name)
			case float64(p.UsedBytes) >= 0.9*float64(p.CapacityBytes):
				a.space = append(a.space, fmt.Sprintf("%s/%s (%d %%)", n.Id, p.Name, p.UsedBytes*100/p.CapacityBytes))
			}
		}
	}
}

// lines are worded for people, the worst first.
func (a *attention) lines() []string {
	var out []string
	add := func(names []string, what, next string) {
		if len(names) > 0 {
			out = append(out, fmt.Sprintf("%s %s: %s", countOf(what, names), next, firstOf(names)))
		}
	}
	if len(a.lost) > 0 {
		out = append(out, fmt.Sprintf("%s lost data: ballastctl volume why %s", countOf("volume", a.lost), a.lost[0]))
	}
	if len(a.inaccessible) > 0 {
		out = append(out, fmt.Sprintf("%s cannot be used, I/O waits: ballastctl volume why %s", countOf("volume", a.inaccessible), a.inaccessible[0]))
	}
	out = append(out, a.quorum...)
	add(a.away, "node", "not reporting")
	add(a.disks, "pool", "without its disk")
	add(a.failed, "pool", "stopped after an error of its disk")
	add(a.space, "pool", "full or nearly so")
	if len(a.degraded) > 0 {
		out = append(out, fmt.Sprintf("%s degraded: ballastctl volume why %s", countOf("volume", a.degraded), a.degraded[0]))
	}
	out = append(out, a.moving...)
	if a.strays > 0 {
		out = append(out, fmt.Sprintf("%d replicas or snapshots on pools are in no record: ballastctl pool strays", a.strays))
	}
	return append(out, a.advice...)
}

func countOf(what string, names []string) string {
	if len(names) == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", len(names), what)
}

// aFew is how many are named of what may be thousands.
const aFew = 5

// firstOf names a few.
func firstOf(names []string) string {
	if len(names) > aFew {
		return strings.Join(names[:aFew], ", ") + ", ..."
	}
	return strings.Join(names, ", ")
}

// RemoveController implements adminpb.AdminServer.
func (s *Service) RemoveController(ctx context.Context, r *adminpb.DeleteRequest) (*adminpb.DeleteReply, error) {
	c, err := s.cluster()
	if err != nil {
		return nil, err
	}
	if r.Ref == "" || len(r.Ref) > volume.MaxNodeIDLen {
		return nil, fmt.Errorf("a node's name has 1 to %d bytes: %w", volume.MaxNodeIDLen, volume.ErrInvalid)
	}
	err = c.RemoveController(ctx, volume.NodeID(r.Ref))
	s.o.Audit.Record(ctx, "controller.remove", r.Ref, "", err)
	if err != nil {
		return nil, err
	}
	return &adminpb.DeleteReply{Id: r.Ref}, nil
}

// CreateJoinToken implements adminpb.AdminServer.
func (s *Service) CreateJoinToken(ctx context.Context, r *adminpb.CreateJoinTokenRequest) (*adminpb.CreateJoinTokenReply, error) {
	c, err := s.cluster()
	if err != nil {
		return nil, err
	}
	life := jointoken.DefaultLifetime
	if r.LifetimeSeconds != 0 {
		if r.LifetimeSeconds < 0 || r.LifetimeSeconds > jointoken.MaxLifetime/int64(time.Second) {
			return nil, fmt.Errorf("a join token lives for up to %dh: %w", time.Duration(jointoken.MaxLifetime)/time.Hour, volume.ErrOutOfRange)
		}
		life = r.LifetimeSeconds * int64(time.Second)
	}
	t, err := c.NewToken()
	if err != nil {
		return nil, err
	}
	now := volume.Timestamp(s.o.Now().UnixNano())
	record := jointoken.Record{
		ID: t.ID(), Hash: t.Hash(), Roles: r.Roles, Node: volume.NodeID(r.Node), Uses: int(r.Uses),
		CreatedAt: now, ExpiresAt: now + volume.Timestamp(life), CreatedBy: audit.Actor(ctx),
	}
	if r.Uses == 0 {
		record.Uses = 1
	}
	if err := record.Check(); err != nil {
		return nil, err
	}
	if err := s.o.Control.CreateJoinToken(ctx, record); err != nil {
		return nil, err
	}
	ns, err := s.o.Control.Nodes(ctx)
	if err != nil {
		// What was made is of no use to anybody who has not got its text.
		return nil, errors.Join(err, s.o.Control.RevokeJoinToken(context.WithoutCancel(ctx), record.ID))
	}
	return &adminpb.CreateJoinTokenReply{Token: tokenToProto(record), Text: t.Text(), Controllers: controllerEndpoints(ns)}, nil
}

// controllerEndpoints are those of the nodes that are controllers and can be reached.
func controllerEndpoints(ns []volume.Node) []*adminpb.Endpoint {
	var out []*adminpb.Endpoint
	for _, n := range ns {
		for _, r := range n.Roles {
			if r == volume.RoleController {
				out = append(out, &adminpb.Endpoint{Node: string(n.ID), Address: n.Address})
			}
		}
	}
	return out
}

func tokenToProto(r jointoken.Record) *adminpb.JoinToken {
	out := &adminpb.JoinToken{
		Id: r.ID, Roles: r.Roles, Node: string(r.Node), Uses: int32(r.Uses), CreatedBy: r.CreatedBy,
		CreatedAt: timeToProto(r.CreatedAt), ExpiresAt: timeToProto(r.ExpiresAt),
	}
	for _, d := range r.Redeemed {
		out.UsedBy = append(out.UsedBy, string(d.Node))
	}
	return out
}

// ListJoinTokens implements adminpb.AdminServer.
func (s *Service) ListJoinTokens(ctx context.Context, _ *adminpb.ListJoinTokensRequest) (*adminpb.ListJoinTokensReply, error) {
	rs, err := s.o.Control.JoinTokens(ctx)
	if err != nil {
		return nil, err
	}
	out := &adminpb.ListJoinTokensReply{}
	for _, r := range rs {
		out.Tokens = append(out.Tokens, tokenToProto(r))
	}
	return out, nil
}

// RevokeJoinToken implements adminpb.AdminServer. The whole text of a token will do: its id is in it.
func (s *Service) RevokeJoinToken(ctx context.Context, r *adminpb.DeleteRequest) (*adminpb.DeleteReply, error) {
	id := r.Ref
	if t, err := jointoken.Parse(id); err == nil {
		id = t.ID()
	}
	rs, err := s.o.Control.JoinTokens(ctx)
	if err != nil {
		return nil, err
	}
	for _, known := range rs {
		if known.ID == id {
			return &adminpb.DeleteReply{Id: id}, s.o.Control.RevokeJoinToken(ctx, id)
		}
	}
	return nil, fmt.Errorf("there is no join token %.32q; those that have expired are gone already: %w", id, volume.ErrNotFound)
}

// IssueCertificate implements adminpb.AdminServer.
func (s *Service) IssueCertificate(ctx context.Context, r *adminpb.IssueCertificateRequest) (*adminpb.IssueCertificateReply, error) {
	c, err := s.cluster()
	if err != nil {
		return nil, err
	}
	id := pki.Admin(r.Name, pki.Role(r.Role))
	if err := errors.Join(volume.CheckName("admin", r.Name), id.Check()); err != nil {
		return nil, err
	}
	life := time.Duration(r.LifetimeSeconds) * time.Second
	if r.LifetimeSeconds < 0 || r.LifetimeSeconds > int64(pki.AdminLifetime/time.Second) {
		return nil, fmt.Errorf("an admin's certificate is valid for up to %s: %w", pki.AdminLifetime, volume.ErrOutOfRange)
	}
	if life == 0 {
		life = pki.AdminLifetime
	}
	chain, err := c.Issue(r.CertificateRequest, id, life)
	expires := s.o.Now().Add(life)
	s.o.Audit.Record(ctx, "certificate.issue", r.Name, fmt.Sprintf("role %s, until %s", r.Role, expires.UTC().Format(time.RFC3339)), err)
	if err != nil {
		return nil, err
	}
	return &adminpb.IssueCertificateReply{Chain: chain, ExpiresAt: timeToProto(volume.Timestamp(expires.UnixNano()))}, nil
}
