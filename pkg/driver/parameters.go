package driver

import (
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strconv"
	"strings"

	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// Parameters of a storage class.
const (
	paramReplicas     = "replicas"
	paramMinInSync    = "minInSync"
	paramDataLocality = "dataLocality"
	paramPool         = "pool"
	paramTenant       = "tenant"
	paramFSType       = "fsType"
	paramBlockSize    = "blockSize"
	// Parameters of a volume attributes class; replicas, minInSync and dataLocality are too.
	paramIOPS      = "iopsLimit"
	paramBandwidth = "bandwidthLimit"
	// Parameter of a snapshot class.
	paramFreeze = "freezeFilesystem"
)

// Keys that Kubernetes' sidecars add, or leave in, under their own prefix.
const (
	kubernetes         = "csi.storage.k8s.io/"
	kubernetesFSType   = kubernetes + "fstype"
	kubernetesTenant   = kubernetes + "pvc/namespace"
	kubernetesPVC      = kubernetes + "pvc/"
	kubernetesPV       = kubernetes + "pv/"
	kubernetesSnapshot = kubernetes + "volumesnapshot"
	kubernetesGroup    = kubernetes + "volumegroupsnapshot"
)

// classParameters is what the parameters of a create say.
type classParameters struct {
	volume.Parameters
	qos    volume.QoS
	tenant string
	// implied: the tenant is the claim's namespace or the default, no parameter asked for it.
	implied bool
}

// metadata tells whether a key only says for whom something is made, or where the sidecar finds its secrets.
func metadata(key string) bool {
	rest, ok := strings.CutPrefix(key, kubernetes)
	return ok && (strings.HasPrefix(key, kubernetesPVC) || strings.HasPrefix(key, kubernetesPV) ||
		strings.HasSuffix(rest, "-secret-name") || strings.HasSuffix(rest, "-secret-namespace"))
}

// parseParameters reads the parameters of a create; mutable ones take precedence. What is not given is zero. It returns
// volume.ErrInvalid naming the first key, in alphabetical order, that is unknown or has an impossible value.
func parseParameters(parameters, mutable map[string]string) (classParameters, error) {
	var p classParameters
	for _, key := range slices.Sorted(maps.Keys(parameters)) {
		value := parameters[key]
		var err error
		switch key {
		case paramReplicas, paramMinInSync, paramDataLocality:
			err = p.setShared(key, value)
		case paramPool:
			p.Pool = value
		case paramTenant:
			p.tenant = value
		case paramFSType, kubernetesFSType:
			if p.FSType != "" && value != "" && value != p.FSType {
				return p, fmt.Errorf("parameters %s and %s contradict each other: %w", paramFSType, kubernetesFSType, volume.ErrInvalid)
			}
			if value != "" { // two keys for one thing: an empty one says nothing
				p.FSType, err = value, checkFSType(value)
			}
		case paramBlockSize:
			p.BlockSize, err = parseBlockSize(value)
		default:
			if !metadata(key) {
				err = fmt.Errorf("unknown, the parameters are %s: %w", strings.Join([]string{paramBlockSize, paramDataLocality,
					paramFSType, paramMinInSync, paramPool, paramReplicas, paramTenant}, ", "), volume.ErrInvalid)
			}
		}
		if err != nil {
			return p, fmt.Errorf("parameter %.64q: %w", key, err)
		}
	}
	if p.tenant == "" {
		p.tenant, p.implied = parameters[kubernetesTenant], true
	}
	for _, key := range slices.Sorted(maps.Keys(mutable)) {
		if err := p.setMutable(key, mutable[key]); err != nil {
			return p, fmt.Errorf("mutable parameter %.64q: %w", key, err)
		}
	}
	return p, nil
}

// parseMutable reads the parameters of a modify.
func parseMutable(mutable map[string]string) (control.Modify, error) {
	p, err := parseParameters(nil, mutable)
	var m control.Modify
	for key, give := range map[string]func(){
		paramIOPS:         func() { m.IOPS = &p.qos.IOPS },
		paramBandwidth:    func() { m.Bandwidth = &p.qos.Bandwidth },
		paramReplicas:     func() { m.Replicas = &p.Replicas },
		paramMinInSync:    func() { m.MinInSync = &p.MinInSync },
		paramDataLocality: func() { m.DataLocality = &p.DataLocality },
	} {
		if _, ok := mutable[key]; ok {
			give()
		}
	}
	return m, err
}

func (p *classParameters) setMutable(key, value string) (err error) {
	switch key {
	case paramIOPS:
		p.qos.IOPS, err = parseQuantity(value)
	case paramBandwidth:
		p.qos.Bandwidth, err = parseQuantity(value)
	case paramReplicas, paramMinInSync, paramDataLocality:
		err = p.setShared(key, value)
	default:
		err = fmt.Errorf("unknown, the mutable parameters are %s: %w",
			strings.Join([]string{paramBandwidth, paramDataLocality, paramIOPS, paramMinInSync, paramReplicas}, ", "), volume.ErrInvalid)
	}
	return err
}

func (p *classParameters) setShared(key, value string) (err error) {
	switch key {
	case paramReplicas:
		p.Replicas, err = parseInt(value, volume.MaxReplicas)
	case paramMinInSync:
		p.MinInSync, err = parseInt(value, volume.MaxReplicas)
	case paramDataLocality:
		switch l := volume.DataLocality(value); l {
		case volume.LocalityPreferred, volume.LocalityRequired, volume.LocalityNone:
			p.DataLocality = l
		default:
			err = fmt.Errorf("%.64q is none of preferred, required, none: %w", value, volume.ErrInvalid)
		}
	}
	return err
}

// parseSnapshotParameters tells whether a mounted filesystem is to be frozen around the cut.
func parseSnapshotParameters(parameters map[string]string) (freeze bool, err error) {
	for _, key := range slices.Sorted(maps.Keys(parameters)) {
		switch {
		case key == paramFreeze:
			switch parameters[key] {
			case "true":
				freeze = true
			case "false":
			default:
				return false, fmt.Errorf("parameter %s is neither true nor false: %w", key, volume.ErrInvalid)
			}
		case strings.HasPrefix(key, kubernetesSnapshot), strings.HasPrefix(key, kubernetesGroup), metadata(key):
		default:
			return false, fmt.Errorf("parameter %.64q is unknown, the only one is %s: %w", key, paramFreeze, volume.ErrInvalid)
		}
	}
	return freeze, nil
}

// parseInt reads an integer from 1 to limit.
func parseInt(s string, limit int) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > limit {
		return 0, fmt.Errorf("%.64q is not an integer from 1 to %d: %w", s, limit, volume.ErrInvalid)
	}
	return n, nil
}

func parseBlockSize(s string) (int, error) {
	switch s {
	case "512":
		return 512, nil
	case "4096":
		return 4096, nil
	}
	return 0, fmt.Errorf("%.64q is neither 512 nor 4096: %w", s, volume.ErrInvalid)
}

// suffixes of Kubernetes quantities.
var suffixes = map[string]int64{
	"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
	"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50, "Ei": 1 << 60,
}

// parseQuantity reads a whole number, plain or as a Kubernetes quantity such as 100Mi or 1.5k. Zero is no limit.
func parseQuantity(s string) (int64, error) {
	bad := fmt.Errorf("%.64q is not a whole number like 5000, 10k or 100Mi: %w", s, volume.ErrInvalid)
	number := strings.TrimRight(s, "kKMGTPEi")
	factor, ok := suffixes[s[len(number):]]
	if !ok || number == "" || len(number) > 32 || strings.Trim(number, "0123456789.") != "" {
		return 0, bad
	}
	r, ok := new(big.Rat).SetString(number)
	if !ok {
		return 0, bad
	}
	r.Mul(r, new(big.Rat).SetInt64(factor))
	if !r.IsInt() || !r.Num().IsInt64() {
		return 0, bad
	}
	return r.Num().Int64(), nil
}
