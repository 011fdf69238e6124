package clusterapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"reflect"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/replication"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// recorder notes what arrives, and answers with an error when it has one.
type recorder struct {
	control.Agents
	Controller
	got []any
	err error
}

func (r *recorder) note(args ...any) error {
	r.got = args
	return r.err
}

// pair is a client with the identity of one node and a server with that of another.
func pair(t *testing.T, s Services, callerRoles ...pki.Role) (*grpc.ClientConn, *pki.CA) {
	t.Helper()
	return pairNoted(t, s, new(Connections), new(Connections), callerRoles...)
}

// pairNoted is pair with connections that are noted on either side.
func pairNoted(t *testing.T, s Services, atServer, atClient *Connections, callerRoles ...pki.Role) (*grpc.ClientConn, *pki.CA) {
	t.Helper()
	ca, err := pki.NewCA(pki.NewClusterID(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	issue := func(id volume.NodeID, roles ...pki.Role) *pki.Credentials {
		key, err := pki.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		csr, err := key.Request()
		if err != nil {
			t.Fatal(err)
		}
		chain, err := ca.Issue(csr, pki.Node(id, roles...), 0, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		c, err := pki.NewCredentials(chain, key, nil)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	server := NewServer(s, issue("n1", pki.RoleController, pki.RoleStorage).ServerWithJoin(nil), atServer)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	tls := pki.JoinClient(ca.Pin(), nil)
	if len(callerRoles) > 0 {
		tls = issue("n2", callerRoles...).Client(pki.IsNode("n1"))
	}
	cc, err := Connect(l.Addr().String(), tls, atClient)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cc.Close()
		server.Stop()
		<-done
	})
	return cc, ca
}

type dialed struct{ cc grpc.ClientConnInterface }

func (d dialed) Node(context.Context, volume.NodeID) (grpc.ClientConnInterface, error) {
	return d.cc, nil
}

func (r *recorder) CreateReplica(_ context.Context, n volume.NodeID, s control.ReplicaSpec) error {
	return r.note(n, s)
}
func (r *recorder) DeleteReplica(_ context.Context, n volume.NodeID, p volume.PoolID, id volume.ReplicaID) error {
	return r.note(n, p, id)
}
func (r *recorder) HasReplica(_ context.Context, n volume.NodeID, p volume.PoolID, id volume.ReplicaID) (bool, error) {
	return true, r.note(n, p, id)
}
func (r *recorder) ResizeReplica(_ context.Context, n volume.NodeID, p volume.PoolID, id volume.ReplicaID, size int64) error {
	return r.note(n, p, id, size)
}
func (r *recorder) ExpandVolume(_ context.Context, at volume.Replica, id volume.ID, e volume.Epoch, size int64) error {
	return r.note(at, id, e, size)
}
func (r *recorder) Fence(_ context.Context, at volume.Replica, id volume.ID, e volume.Epoch) (time.Duration, error) {
	return 1234 * time.Millisecond, r.note(at, id, e)
}
func (r *recorder) Inspect(_ context.Context, at volume.Replica, id volume.ID) (control.ReplicaReport, error) {
	return control.ReplicaReport{Present: true, Epoch: 5, Size: 1 << 40}, r.note(at, id)
}
func (r *recorder) OpenEngine(_ context.Context, n volume.NodeID, id volume.ID, e volume.Epoch) error {
	return r.note(n, id, e)
}
func (r *recorder) Evict(_ context.Context, n volume.NodeID, id volume.ID, e volume.Epoch, replica volume.ReplicaID) error {
	return r.note(n, id, e, replica)
}
func (r *recorder) CutSnapshot(_ context.Context, n volume.NodeID, s control.SnapshotSpec) ([]volume.ReplicaID, error) {
	return []volume.ReplicaID{"a", "b"}, r.note(n, s)
}
func (r *recorder) Drain(_ context.Context, n volume.NodeID, s control.SnapshotSpec) error {
	return r.note(n, s)
}
func (r *recorder) Release(_ context.Context, n volume.NodeID, s control.SnapshotSpec) error {
	return r.note(n, s)
}
func (r *recorder) DeleteSnapshot(_ context.Context, n volume.NodeID, p volume.PoolID, id volume.SnapshotID, of volume.ReplicaID, upTo uint64) error {
	return r.note(n, p, id, of, upTo)
}
func (r *recorder) Detach(_ context.Context, n volume.NodeID, id volume.ID, e volume.Epoch) (bool, error) {
	return true, r.note(n, id, e)
}
func (r *recorder) SetQoS(_ context.Context, n volume.NodeID, id volume.ID, e volume.Epoch, q volume.QoS) error {
	return r.note(n, id, e, q)
}
func (r *recorder) Observe(_ context.Context, n volume.NodeID, of []control.Subject) ([]control.Observation, error) {
	return []control.Observation{
		{Replica: []volume.Condition{{Severity: volume.Degraded, Reason: "X", Message: "y"}}},
		{Engine: &volume.EngineReport{Phase: "live", Epoch: 9, Resyncs: []volume.Resync{{Replica: "r", Left: 1 << 40}}}},
	}, r.note(n, of)
}
func (r *recorder) Expel(_ context.Context, n, removed volume.NodeID) error {
	return r.note(n, removed)
}
func (r *recorder) Digest(_ context.Context, h volume.Replica, s volume.SnapshotID, off int64, n int) (control.Digest, error) {
	return control.Digest{Regions: []control.RegionDigest{{Offset: 1 << 40, Sum: []byte{0, 255}}}, Next: 1 << 41}, r.note(h, s, off, n)
}
func (r *recorder) Extents(_ context.Context, h volume.Replica, s, base volume.SnapshotID, off int64, fn func(control.Extent) error) error {
	for i := range int64(2*batchExtents + 1) {
		if err := fn(control.Extent{Offset: i, Length: 1}); err != nil {
			return err
		}
	}
	return r.note(h, s, base, off)
}

// TestAgents calls every method of Node: what the node gets, and what the caller gets back, is what was given.
func TestAgents(t *testing.T) {
	r := &recorder{}
	cc, _ := pair(t, Services{Node: r}, pki.RoleController)
	client := reflect.ValueOf(NewAgents(dialed{cc}))
	port := reflect.TypeFor[Node]()
	for i := range port.NumMethod() {
		m := port.Method(i)
		t.Run(m.Name, func(t *testing.T) {
			args := []reflect.Value{reflect.ValueOf(t.Context())}
			extents := 0
			for a := 1; a < m.Type.NumIn(); a++ {
				if m.Type.In(a).Kind() == reflect.Func {
					args = append(args, reflect.ValueOf(func(e control.Extent) error {
						if e.Offset != int64(extents) {
							t.Fatalf("extent %d is %+v", extents, e)
						}
						extents++
						return nil
					}))
					continue
				}
				v := reflect.New(m.Type.In(a)).Elem()
				fill(v, 10*i+a)
				args = append(args, v)
			}
			want := reflect.ValueOf(r).MethodByName(m.Name).Call(args) // what it answers, and args as it notes them
			given := slices.Clone(r.got)
			r.got, extents = nil, 0
			got := client.MethodByName(m.Name).Call(args)
			if !reflect.DeepEqual(r.got, given) {
				t.Errorf("arrived as %+v, not %+v", r.got, given)
			}
			for k := range want {
				if !reflect.DeepEqual(got[k].Interface(), want[k].Interface()) {
					t.Errorf("answered %+v, not %+v", got[k].Interface(), want[k].Interface())
				}
			}
			r.err = fmt.Errorf("the disk is on fire: %w", volume.ErrDataLoss)
			extents = 0
			got = client.MethodByName(m.Name).Call(args)
			err, _ := got[len(got)-1].Interface().(error)
			if !errors.Is(err, volume.ErrDataLoss) || err.Error() != r.err.Error() {
				t.Errorf("its error came back as %v", err)
			}
			r.err = nil
		})
	}
}

// fill gives every field that can be sent a value of its own.
func fill(v reflect.Value, n int) {
	switch v.Kind() {
	case reflect.String:
		v.SetString(fmt.Sprint("s", n))
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(n) << 33)
	case reflect.Uint64, reflect.Uint8:
		v.SetUint(uint64(n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range v.Len() {
			fill(v.Index(i), n%1000*10+i)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i), n*100+i)
		}
	default:
		panic("no value for a " + v.Type().String())
	}
}

// TestWhoMayAsk: nodes' services are for controllers, controllers' for nodes, and nobody speaks for another.
func TestWhoMayAsk(t *testing.T) {
	r := &recorder{}
	t.Run("a storage node", func(t *testing.T) {
		cc, _ := pair(t, Services{Node: r, Controller: r}, pki.RoleStorage)
		if _, err := NewAgents(dialed{cc}).Detach(t.Context(), "n1", "v", 1); !errors.Is(err, errRefused) {
			t.Errorf("asks a node: %v", err)
		}
		c := NewCluster(func() []grpc.ClientConnInterface { return []grpc.ClientConnInterface{cc} })
		if err := c.RegisterNode(t.Context(), volume.Node{ID: "n3"}); !errors.Is(err, volume.ErrDenied) {
			t.Errorf("registers another: %v", err)
		}
		if err := c.RegisterNode(t.Context(), volume.Node{ID: "n2", Roles: []volume.NodeRole{volume.RoleStorage, volume.RoleController}}); !errors.Is(err, volume.ErrDenied) {
			t.Errorf("makes itself a controller: %v", err)
		}
		if _, err := c.Commit(t.Context(), "v", replication.Change{Attach: &replication.Attach{Node: "n3"}}); !errors.Is(err, volume.ErrDenied) {
			t.Errorf("attaches to another: %v", err)
		}
	})
	t.Run("a node that was removed since it connected", func(t *testing.T) {
		var removed atomic.Bool
		cc, _ := pair(t, Services{Controller: r, Admits: func(pki.Peer) error {
			if removed.Load() {
				return pki.ErrRefused
			}
			return nil
		}}, pki.RoleStorage)
		c := NewCluster(func() []grpc.ClientConnInterface { return []grpc.ClientConnInterface{cc} })
		if _, err := c.Ended(t.Context(), nil); err != nil {
			t.Errorf("as a member: %v", err)
		}
		removed.Store(true)
		if _, err := c.Ended(t.Context(), nil); !errors.Is(err, errRefused) {
			t.Errorf("is answered: %v", err)
		}
	})
	t.Run("nobody", func(t *testing.T) {
		cc, _ := pair(t, Services{Node: r, Controller: r})
		c := NewCluster(func() []grpc.ClientConnInterface { return []grpc.ClientConnInterface{cc} })
		if _, err := c.Record(t.Context(), "v"); !errors.Is(err, errRefused) {
			t.Errorf("reads a volume: %v", err)
		}
		if _, err := c.Join(t.Context(), Join{}); err != nil {
			t.Errorf("may not join: %v", err)
		}
	})
}

func (r *recorder) Join(context.Context, Join) (Joined, error) { return Joined{}, nil }
func (r *recorder) CommitBy(_ context.Context, n volume.NodeID, id volume.ID, c replication.Change) (replication.Membership, error) {
	return replication.Membership{Volume: id, Epoch: 7}, r.note(n, id)
}
func (r *recorder) SetFilesystemBy(_ context.Context, n volume.NodeID, id volume.ID, fs volume.Filesystem) error {
	return r.note(n, id, fs)
}
func (r *recorder) AddHolderBy(_ context.Context, n volume.NodeID, id volume.SnapshotID, replica volume.ReplicaID) error {
	return r.note(n, id, replica)
}
func (r *recorder) Ended(_ context.Context, engines map[volume.ID]volume.Epoch) ([]volume.ID, error) {
	return []volume.ID{"gone"}, r.note(engines)
}

// TestTheCallerIsNamed: what only the node may ask that runs an engine, or has a volume attached, is asked in the name that its
// certificate has, and a refusal keeps its code.
func TestTheCallerIsNamed(t *testing.T) {
	r := &recorder{}
	cc, _ := pair(t, Services{Controller: r}, pki.RoleStorage) // n2
	c := NewCluster(func() []grpc.ClientConnInterface { return []grpc.ClientConnInterface{cc} })
	fs := volume.Filesystem{Phase: volume.Formatting, Type: "ext4"}
	for name, call := range map[string]func() error{
		"[n2 v]": func() error {
			_, err := c.Commit(t.Context(), "v", replication.Change{Reconfigure: &replication.Reconfigure{}})
			return err
		},
		"[n2 v {formatting ext4}]": func() error { return c.SetFilesystem(t.Context(), "v", fs) },
		"[n2 s r]":                 func() error { return c.AddHolder(t.Context(), "s", "r") },
	} {
		if err := call(); err != nil || fmt.Sprint(r.got) != name {
			t.Errorf("arrived as %v, not %s; %v", r.got, name, err)
		}
		r.err = fmt.Errorf("n3 has it: %w", volume.ErrDenied)
		if err := call(); !errors.Is(err, volume.ErrDenied) {
			t.Errorf("%s is refused with %v", name, err)
		}
		r.err = nil
	}
	if got, err := c.Ended(t.Context(), map[volume.ID]volume.Epoch{"v": 3}); err != nil || fmt.Sprint(got, r.got) != "[gone] [map[v:3]]" {
		t.Errorf("%v, arrived as %v; %v", got, r.got, err)
	}
}

// TestCommit: a refusal brings the current record along, an unknown outcome is ErrUnavailable.
func TestCommit(t *testing.T) {
	r := &recorder{}
	cc, _ := pair(t, Services{Controller: r}, pki.RoleStorage)
	c := NewCluster(func() []grpc.ClientConnInterface { return []grpc.ClientConnInterface{cc} })
	change := replication.Change{DropReplica: &replication.DropReplica{ID: "r"}}
	for _, tc := range []struct {
		name    string
		err     error
		is      error
		current bool
	}{
		{"done", nil, nil, true},
		{"refused", replication.ErrStaleVersion, volume.ErrStale, true},
		{"unknown", fmt.Errorf("no leader: %w", volume.ErrUnavailable), volume.ErrUnavailable, false},
	} {
		r.err = tc.err
		m, err := c.Commit(t.Context(), "v", change)
		if !errors.Is(err, tc.is) || (m.Epoch == 7) != tc.current {
			t.Errorf("%s: %+v, %v", tc.name, m, err)
		}
	}
	cc.Close()
	if _, err := c.Commit(t.Context(), "v", change); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("without a connection: %v", err)
	}
}

// silent is a controller that answers nothing.
type silent struct {
	grpc.ClientConnInterface
	asked int
}

func (s *silent) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	s.asked++
	<-ctx.Done()
	return status.FromContextError(ctx.Err()).Err()
}

// A controller that does not answer is asked once in vain: the next call goes to another.
func TestASilentControllerIsPassedOver(t *testing.T) {
	r := &recorder{}
	cc, _ := pair(t, Services{Controller: r}, pki.RoleStorage)
	mute := &silent{}
	c := NewCluster(func() []grpc.ClientConnInterface { return []grpc.ClientConnInterface{mute, cc} })
	call := func(within time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		_, err := c.Join(ctx, Join{})
		return err
	}
	if err := call(50 * time.Millisecond); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("a controller that does not answer: %v", err)
	}
	for range 3 {
		if err := call(10 * time.Second); err != nil {
			t.Error(err)
		}
	}
	if mute.asked != 1 {
		t.Errorf("it was asked %d times", mute.asked)
	}
}
