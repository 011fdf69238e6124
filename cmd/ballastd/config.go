package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"github.com/ballast-csi/ballast/pkg/command"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// config is what the daemon is to do.
type config struct {
	dataDir, runDir string
	node            volume.NodeID
	// Socket paths; "" is not served. csi has every service.
	csi, controller, nodeSocket, admin string
	metrics                            string
	// cluster is where other nodes reach this one; nil on a lone node.
	cluster     *clusterConfig
	pools       []poolConfig
	stopTimeout time.Duration
	// replicaTimeout is for how long a replica may be away before another is made elsewhere.
	replicaTimeout time.Duration
	logLevel       slog.Level
	logFormat      string
}

// clusterConfig is a node's place in a cluster.
type clusterConfig struct {
	listen, advertise endpoints
	zone              string
	// join is a token, "" where the node founds a cluster or has joined one; controllers are whom it asks.
	join        string
	controllers []string
	// plaintext sends what is replicated in clear.
	plaintext bool
}

// endpoints are the four addresses of a node, on adjacent ports: of the cluster API, of the controllers' log, of replicas,
// and of the admin API.
type endpoints struct{ host, api, raft, data, admin string }

// parseEndpoints reads HOST:PORT, of which PORT is the first.
func parseEndpoints(address string) (endpoints, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return endpoints{}, err
	}
	first, err := strconv.ParseUint(port, 10, 16)
	if err != nil || first == 0 || first > 65532 {
		return endpoints{}, fmt.Errorf("%q: the port is none of 1 to 65532; the three after it are used too", address)
	}
	at := func(n uint64) string { return net.JoinHostPort(host, strconv.FormatUint(first+n, 10)) }
	return endpoints{host: host, api: at(0), raft: at(1), data: at(2), admin: at(3)}, nil
}

// poolConfig is one pool.
type poolConfig struct {
	name string
	// path is the pool's directory; with a device, where its filesystem is mounted.
	path string
	// device is a raw disk, or "".
	device string
	// wipe allows a disk that carries something to be overwritten.
	wipe bool
	// capacity in bytes; 0 is what the directory's filesystem offers.
	capacity int64
	// overProvision bounds what is provisioned, as a multiple of the capacity.
	overProvision float64
	// reserve in bytes is kept for deletes and metadata; 0 is the pool's own default.
	reserve int64
}

func (p poolConfig) kind() volume.PoolKind {
	if p.device != "" {
		return volume.PoolDisk
	}
	return volume.PoolDir
}

// settings are the values of the flags before they are checked.
type settings struct {
	file, dataDir, runDir, node                   string
	csi, controller, nodeEndpoint, admin, metrics string
	listen, advertise, zone, join                 string
	controllers                                   []string
	plaintext                                     bool
	pools                                         []string
	poolCapacity, reserve                         string
	overProvision                                 float64
	stopTimeout, replicaTimeout                   time.Duration
	logLevel, logFormat                           string
}

func addFlags(f *pflag.FlagSet) *settings {
	s := &settings{}
	f.StringVar(&s.file, "config", "", "YAML `file` of settings")
	f.StringVar(&s.dataDir, "data-dir", "/var/lib/ballast", "`directory` that keeps everything")
	f.StringVar(&s.runDir, "run-dir", "/run/ballast", "`directory` of sockets and internal mounts; empty after a boot")
	f.StringVar(&s.node, "node-id", "", "`name` of this node (default: the host's name)")
	f.StringVar(&s.csi, "csi-endpoint", "", "`socket` of all CSI services (default: csi.sock in the run directory, unless the endpoints are split)")
	f.StringVar(&s.controller, "controller-endpoint", "", "`socket` of CSI's identity and controller services")
	f.StringVar(&s.nodeEndpoint, "node-endpoint", "", "`socket` of CSI's identity and node services")
	f.StringVar(&s.admin, "admin-endpoint", "", "`socket` of the admin API (default: admin.sock in the run directory)")
	f.StringVar(&s.metrics, "metrics-address", "", "`host:port` of /metrics, /healthz and /readyz over HTTP (default: not served)")
	f.StringVar(&s.listen, "listen", "", "`host:port` at which other nodes reach this one; the three ports after it are used too (default: this node is alone). Without --join it begins a new cluster")
	f.StringVar(&s.advertise, "advertise", "", "`host:port` that other nodes are told instead of --listen's")
	f.StringVar(&s.join, "join", "", "`token` with which the node joins a cluster, from ballastctl cluster join-token; @FILE reads it from a file. A node that has joined passes over it")
	f.StringSliceVar(&s.controllers, "controllers", nil, "`host:port,...` of controllers of the cluster to join, as their --listen or --advertise says")
	f.StringVar(&s.zone, "zone", "", "`name` of what fails together with this node; replicas are spread over zones")
	f.BoolVar(&s.plaintext, "plaintext-replication", false, "send volumes' data between nodes without TLS: faster, and readable and forgeable on the network. All nodes must agree")
	f.StringArrayVar(&s.pools, "pool", nil, "a pool, `name=path[,option=value...]`; may be repeated. Options: capacity, reserve, over-provision; device=/dev/... makes it of a whole raw disk, mounted at path, and wipe=true lets it overwrite what the disk carries (default: default=DATA-DIR/pools/default)")
	f.StringVar(&s.poolCapacity, "pool-capacity", "", "`size` of pools that do not say theirs (default: what their filesystem has)")
	f.Float64Var(&s.overProvision, "over-provision", 10, "`ratio` of provisioned bytes to capacity that pools allow")
	f.StringVar(&s.reserve, "reserve", "", "`size` that pools keep for deletes and metadata (default: the pool's own)")
	f.DurationVar(&s.stopTimeout, "stop-timeout", 20*time.Second, "how long calls may take to end when the daemon stops, and then devices and pools to be closed")
	f.DurationVar(&s.replicaTimeout, "replica-timeout", 10*time.Minute, "how long a replica may be away before another is made on another node; the leading controller's counts, so give all controllers the same. A node counts as away after 2m at the earliest")
	f.StringVar(&s.logLevel, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&s.logFormat, "log-format", "text", "text or json")
	return s
}

// envName of a flag.
func envName(flag string) string {
	if flag == "csi-endpoint" {
		return "CSI_ENDPOINT"
	}
	return "BALLAST_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// config joins flags, environment and file, and checks the result.
func (s *settings) config(f *pflag.FlagSet) (config, error) {
	set := func(name, value, from string) error {
		if err := f.Set(name, value); err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
		return nil
	}
	fromFlags := map[string]bool{}
	var err error
	f.Visit(func(fl *pflag.Flag) { fromFlags[fl.Name] = true })
	fromEnv := map[string]bool{}
	f.VisitAll(func(fl *pflag.Flag) {
		v := os.Getenv(envName(fl.Name))
		if fl.Name == "help" || v == "" || fromFlags[fl.Name] {
			return
		}
		fromEnv[fl.Name] = true
		values := []string{v}
		if fl.Name == "pool" {
			values = strings.Fields(v)
		}
		for _, v := range values {
			err = errors.Join(err, set(fl.Name, v, envName(fl.Name)))
		}
	})
	if err != nil {
		return config{}, err
	}
	if s.file != "" {
		if err := s.read(f, func(name string) bool { return fromFlags[name] || fromEnv[name] }, set); err != nil {
			return config{}, err
		}
	}
	return s.check()
}

// maxFile bounds the file of settings, in bytes.
const maxFile = 1 << 20

func (s *settings) read(f *pflag.FlagSet, given func(string) bool, set func(name, value, from string) error) error {
	file, err := os.Open(s.file)
	if err != nil {
		return err
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxFile))
	if err != nil {
		return err
	}
	var values map[string]any
	if err := yaml.UnmarshalStrict(b, &values); err != nil {
		return fmt.Errorf("%s: %w", s.file, err)
	}
	for name, v := range values {
		from := s.file + ": " + name
		if f.Lookup(name) == nil || name == "config" || name == "help" {
			return fmt.Errorf("%s: there is no such setting; they are named like the flags, see ballastd --help", from)
		}
		if given(name) {
			continue
		}
		list, ok := v.([]any)
		if !ok {
			list = []any{v}
		}
		for _, v := range list {
			var text string
			switch v := v.(type) {
			case string:
				text = v
			case float64:
				text = strconv.FormatFloat(v, 'f', -1, 64)
			case bool:
				text = strconv.FormatBool(v)
			default:
				return fmt.Errorf("%s: %v is no plain value", from, v)
			}
			if err := set(name, text, from); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *settings) check() (config, error) {
	c := config{stopTimeout: s.stopTimeout, replicaTimeout: s.replicaTimeout, logFormat: s.logFormat, metrics: s.metrics}
	var err error
	if err := c.logLevel.UnmarshalText([]byte(s.logLevel)); err != nil {
		return c, fmt.Errorf("log-level: %q is none of debug, info, warn, error", s.logLevel)
	}
	if s.logFormat != "text" && s.logFormat != "json" {
		return c, fmt.Errorf("log-format: %q is neither text nor json", s.logFormat)
	}
	if s.stopTimeout <= 0 {
		return c, errors.New("stop-timeout: must be more than 0")
	}
	if s.replicaTimeout <= 0 {
		return c, errors.New("replica-timeout: must be more than 0")
	}
	if c.dataDir, err = filepath.Abs(s.dataDir); err != nil {
		return c, err
	}
	if c.runDir, err = filepath.Abs(s.runDir); err != nil {
		return c, err
	}
	if c.metrics != "" {
		if _, _, err := net.SplitHostPort(c.metrics); err != nil {
			return c, fmt.Errorf("metrics-address: %w", err)
		}
	}

	name := s.node
	if name == "" {
		if name, err = os.Hostname(); err != nil {
			return c, fmt.Errorf("the host has no name; give one with --node-id: %w", err)
		}
	}
	if err := checkNode(name); err != nil {
		return c, err
	}
	c.node = volume.NodeID(name)

	if s.csi == "" && s.controller == "" && s.nodeEndpoint == "" {
		s.csi = filepath.Join(c.runDir, "csi.sock")
	}
	if s.admin == "" {
		s.admin = filepath.Join(c.runDir, "admin.sock")
	}
	seen := map[string]string{}
	for _, e := range []struct {
		name, in string
		out      *string
	}{
		{"csi-endpoint", s.csi, &c.csi},
		{"controller-endpoint", s.controller, &c.controller},
		{"node-endpoint", s.nodeEndpoint, &c.nodeSocket},
		{"admin-endpoint", s.admin, &c.admin},
	} {
		if e.in == "" {
			continue
		}
		if *e.out, err = socketPath(e.in); err != nil {
			return c, fmt.Errorf("%s: %w", e.name, err)
		}
		if other := seen[*e.out]; other != "" {
			return c, fmt.Errorf("%s and %s are the same socket, %s", other, e.name, *e.out)
		}
		seen[*e.out] = e.name
	}
	if c.cluster, err = s.clusterConfig(); err != nil {
		return c, err
	}
	c.pools, err = s.poolConfigs(c.dataDir)
	return c, err
}

// maxToken bounds a file with a join token, in bytes.
const maxToken = 4 << 10

func (s *settings) clusterConfig() (*clusterConfig, error) {
	if s.listen == "" {
		for name, given := range map[string]bool{
			"advertise": s.advertise != "", "join": s.join != "", "controllers": len(s.controllers) > 0, "zone": s.zone != "",
			"plaintext-replication": s.plaintext,
		} {
			if given {
				return nil, fmt.Errorf("%s: needs --listen, without which this node is alone", name)
			}
		}
		return nil, nil
	}
	c := &clusterConfig{zone: s.zone, join: s.join, controllers: s.controllers, plaintext: s.plaintext}
	var err error
	if c.listen, err = parseEndpoints(s.listen); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	c.advertise = c.listen
	if s.advertise != "" {
		if c.advertise, err = parseEndpoints(s.advertise); err != nil {
			return nil, fmt.Errorf("advertise: %w", err)
		}
	}
	if ip := net.ParseIP(c.advertise.host); c.advertise.host == "" || ip != nil && ip.IsUnspecified() {
		return nil, fmt.Errorf("advertise: other nodes cannot reach %q; give the address that they are to use", c.advertise.api)
	}
	if len(c.zone) > 63 {
		return nil, fmt.Errorf("zone: %q has %d bytes, the limit is 63", c.zone, len(c.zone))
	}
	for _, a := range c.controllers {
		if _, err := parseEndpoints(a); err != nil {
			return nil, fmt.Errorf("controllers: %w", err)
		}
	}
	if file, ok := strings.CutPrefix(c.join, "@"); ok {
		f, err := os.Open(file)
		if errors.Is(err, os.ErrNotExist) {
			// A token that was used is best removed.
			if _, statErr := os.Stat(filepath.Join(s.dataDir, clusterDir, nodeFile)); statErr == nil {
				c.join = ""
				return c, nil
			}
		}
		if err != nil {
			return nil, fmt.Errorf("join: %w", err)
		}
		defer f.Close()
		b, err := io.ReadAll(io.LimitReader(f, maxToken))
		if err != nil {
			return nil, fmt.Errorf("join: %w", err)
		}
		c.join = strings.TrimSpace(string(b))
	}
	if c.join != "" && len(c.controllers) == 0 {
		return nil, errors.New("join: needs --controllers, the addresses of the cluster's controllers")
	}
	return c, nil
}

// checkNode holds a node's name to what it must be as a topology value: in Kubernetes a label's.
func checkNode(name string) error {
	if len(name) > 63 {
		return fmt.Errorf("node-id: %q has %d bytes, the limit is 63, that of a topology value", name, len(name))
	}
	for i, r := range name {
		alnum := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		inner := i > 0 && i < len(name)-1 && (r == '-' || r == '_' || r == '.')
		if !alnum && !inner {
			return fmt.Errorf("node-id: %q must be letters, digits, and within them '-', '_', '.'", name)
		}
	}
	return nil
}

// maxSocketPath is sizeof(sockaddr_un.sun_path) less its final NUL, unix(7).
const maxSocketPath = 107

// socketPath of an endpoint as CSI writes it: unix:///path, unix:path or a path.
func socketPath(endpoint string) (string, error) {
	path := endpoint
	if scheme, rest, ok := strings.Cut(endpoint, ":"); ok {
		if !strings.EqualFold(scheme, "unix") {
			return "", fmt.Errorf("%q is no Unix socket; write it like unix:///run/ballast/csi.sock", endpoint)
		}
		path = strings.TrimPrefix(rest, "//")
	}
	if path == "" {
		return "", fmt.Errorf("%q names no path", endpoint)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if len(path) > maxSocketPath {
		return "", fmt.Errorf("%q has %d bytes, a socket's path at most %d", path, len(path), maxSocketPath)
	}
	return path, nil
}

func (s *settings) poolConfigs(dataDir string) ([]poolConfig, error) {
	base := poolConfig{overProvision: s.overProvision}
	var err error
	if base.capacity, err = sizeSetting("pool-capacity", s.poolCapacity); err != nil {
		return nil, err
	}
	if base.reserve, err = sizeSetting("reserve", s.reserve); err != nil {
		return nil, err
	}
	pools := s.pools
	if len(pools) == 0 {
		pools = []string{"default=" + filepath.Join(dataDir, "pools", "default")}
	}
	if len(pools) > command.MaxPools {
		return nil, fmt.Errorf("pool: %d pools, the limit is %d", len(pools), command.MaxPools)
	}
	var out []poolConfig
	names, paths := map[string]bool{}, map[string]bool{}
	for _, text := range pools {
		p, err := parsePool(text, base)
		if err != nil {
			return nil, fmt.Errorf("pool %q: %w", text, err)
		}
		if names[p.name] || paths[p.path] {
			return nil, fmt.Errorf("pool %q: another pool has this name or this path", text)
		}
		names[p.name], paths[p.path] = true, true
		out = append(out, p)
	}
	return out, nil
}

// maxOverProvision is the controllers' limit.
const maxOverProvision = 100

func parsePool(text string, p poolConfig) (poolConfig, error) {
	first, options, _ := strings.Cut(text, ",")
	name, path, ok := strings.Cut(first, "=")
	if !ok || path == "" {
		return p, errors.New("write it like name=path[,capacity=100Gi]")
	}
	if err := volume.CheckName("name", name); err != nil {
		return p, err
	}
	if strings.ContainsAny(name, "/ \t\n\r") {
		return p, errors.New("a pool's name has neither slashes nor white space")
	}
	p.name = name
	var err error
	if p.path, err = filepath.Abs(path); err != nil {
		return p, err
	}
	if options != "" {
		for _, o := range strings.Split(options, ",") {
			key, value, _ := strings.Cut(o, "=")
			switch key {
			case "capacity":
				p.capacity, err = sizeSetting(key, value)
			case "reserve":
				p.reserve, err = sizeSetting(key, value)
			case "over-provision":
				p.overProvision, err = strconv.ParseFloat(value, 64)
			case "device":
				if p.device = value; !filepath.IsAbs(value) {
					err = fmt.Errorf("device: %q is not the full path of a disk", value)
				}
			case "wipe":
				p.wipe, err = strconv.ParseBool(value)
			default:
				err = fmt.Errorf("%q is none of capacity, over-provision, reserve, device, wipe", key)
			}
			if err != nil {
				return p, err
			}
		}
	}
	if p.wipe && p.device == "" {
		return p, errors.New("wipe is for a pool with a device")
	}
	if !(p.overProvision >= 1 && p.overProvision <= maxOverProvision) {
		return p, fmt.Errorf("over-provision %g is not between 1 and %d", p.overProvision, maxOverProvision)
	}
	return p, nil
}

// sizeSetting reads a size like 100Gi; "" is 0.
func sizeSetting(name, text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	n, err := humanize.ParseBytes(text)
	if err != nil || n > 1<<56 { // the controllers' limit
		return 0, fmt.Errorf("%s: %q is no size, or larger than 64 PiB; write it like 100Gi", name, text)
	}
	return int64(n), nil
}
