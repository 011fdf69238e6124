package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/ballast-csi/ballast/pkg/clusterapi"
	"github.com/ballast-csi/ballast/pkg/control"
	"github.com/ballast-csi/ballast/pkg/pki"
	"github.com/ballast-csi/ballast/pkg/volume"
)

// admission is clusterapi.Controller: control's use cases, and the certificates that only a controller can give.
type admission struct {
	*control.Service
	ca *pki.CA
}

var _ clusterapi.Controller = admission{}

// Join implements clusterapi.Controller. The token is redeemed first: cut off after that, the same node asks again with the
// same key and is answered again.
func (a admission) Join(ctx context.Context, r clusterapi.Join) (clusterapi.Joined, error) {
	hash, err := pki.KeyHash(r.CSR)
	if err != nil {
		return clusterapi.Joined{}, err
	}
	if r.Claim.Key != fmt.Sprintf("%x", hash) {
		return clusterapi.Joined{}, fmt.Errorf("the claim is not for the key that is to be certified: %w", volume.ErrInvalid)
	}
	record, err := a.RedeemJoinToken(ctx, r.Claim)
	if err != nil {
		return clusterapi.Joined{}, err
	}
	var roles []pki.Role
	for _, role := range record.Roles {
		roles = append(roles, pki.Role(role))
	}
	answer, who := clusterapi.Joined{}, pki.Node(r.Claim.Node, roles...)
	who.Generation = record.Of(r.Claim).Generation
	if answer.Chain, err = a.ca.Issue(r.CSR, who, 0, time.Now()); err != nil {
		return clusterapi.Joined{}, err
	}
	if slices.Contains(roles, pki.RoleController) {
		if answer.CA, err = a.ca.Marshal(); err != nil {
			return clusterapi.Joined{}, err
		}
	}
	return answer, nil
}

// Renew implements clusterapi.Controller. The roles are those of the node's record: a certificate does not outlive what it
// says. The generation is that of the caller's certificate: one whose place another has taken stays refused.
func (a admission) Renew(ctx context.Context, id volume.NodeID, generation uint64, csr []byte) ([]byte, error) {
	n, err := a.Node(ctx, id)
	if err != nil {
		return nil, err
	}
	var roles []pki.Role
	for _, r := range n.Roles {
		roles = append(roles, pki.Role(r))
	}
	who := pki.Node(id, roles...)
	who.Generation = generation
	return a.ca.Issue(csr, who, 0, time.Now())
}
