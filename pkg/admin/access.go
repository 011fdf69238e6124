package admin

import (
	"context"
	"crypto/tls"
	"fmt"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/pki"
)

// access says which role each method takes. A method that is not in it is refused. An operator changes what is kept, an
// admin who keeps it and what may be lost with it.
var access = map[string]pki.Role{
	adminpb.Admin_Version_FullMethodName:           pki.RoleViewer,
	adminpb.Admin_Health_FullMethodName:            pki.RoleViewer,
	adminpb.Admin_Cluster_FullMethodName:           pki.RoleViewer,
	adminpb.Admin_ListVolumes_FullMethodName:       pki.RoleViewer,
	adminpb.Admin_GetVolume_FullMethodName:         pki.RoleViewer,
	adminpb.Admin_ListReplicas_FullMethodName:      pki.RoleViewer,
	adminpb.Admin_ListCandidates_FullMethodName:    pki.RoleViewer,
	adminpb.Admin_ListSnapshots_FullMethodName:     pki.RoleViewer,
	adminpb.Admin_GetSnapshot_FullMethodName:       pki.RoleViewer,
	adminpb.Admin_ListGroups_FullMethodName:        pki.RoleViewer,
	adminpb.Admin_GetGroup_FullMethodName:          pki.RoleViewer,
	adminpb.Admin_ListNodes_FullMethodName:         pki.RoleViewer,
	adminpb.Admin_GetNode_FullMethodName:           pki.RoleViewer,
	adminpb.Admin_ListDrainBlockers_FullMethodName: pki.RoleViewer,
	adminpb.Admin_ListPools_FullMethodName:         pki.RoleViewer,
	adminpb.Admin_GetPool_FullMethodName:           pki.RoleViewer,
	adminpb.Admin_ListStrays_FullMethodName:        pki.RoleViewer,
	adminpb.Admin_ListQuotas_FullMethodName:        pki.RoleViewer,
	adminpb.Admin_GetQuota_FullMethodName:          pki.RoleViewer,
	adminpb.Admin_ListJoinTokens_FullMethodName:    pki.RoleViewer,
	adminpb.Admin_Why_FullMethodName:               pki.RoleViewer,
	adminpb.Admin_Watch_FullMethodName:             pki.RoleViewer,
	adminpb.Admin_Audit_FullMethodName:             pki.RoleViewer,

	adminpb.Admin_CreateVolume_FullMethodName:   pki.RoleOperator,
	adminpb.Admin_DeleteVolume_FullMethodName:   pki.RoleOperator,
	adminpb.Admin_ExpandVolume_FullMethodName:   pki.RoleOperator,
	adminpb.Admin_SetVolume_FullMethodName:      pki.RoleOperator,
	adminpb.Admin_DetachVolume_FullMethodName:   pki.RoleOperator,
	adminpb.Admin_CreateSnapshot_FullMethodName: pki.RoleOperator,
	adminpb.Admin_DeleteSnapshot_FullMethodName: pki.RoleOperator,
	adminpb.Admin_CreateGroup_FullMethodName:    pki.RoleOperator,
	adminpb.Admin_DeleteGroup_FullMethodName:    pki.RoleOperator,
	adminpb.Admin_SetQuota_FullMethodName:       pki.RoleOperator,
	adminpb.Admin_DeleteQuota_FullMethodName:    pki.RoleOperator,
	adminpb.Admin_DrainNode_FullMethodName:      pki.RoleOperator,
	adminpb.Admin_UndrainNode_FullMethodName:    pki.RoleOperator,

	adminpb.Admin_Export_FullMethodName:           pki.RoleAdmin, // on a socket of the node, for who is root there
	adminpb.Admin_EmptyNode_FullMethodName:        pki.RoleAdmin,
	adminpb.Admin_RemoveNode_FullMethodName:       pki.RoleAdmin,
	adminpb.Admin_ForgetPool_FullMethodName:       pki.RoleAdmin,
	adminpb.Admin_SalvageVolume_FullMethodName:    pki.RoleAdmin,
	adminpb.Admin_RemoveController_FullMethodName: pki.RoleAdmin,
	adminpb.Admin_CreateJoinToken_FullMethodName:  pki.RoleAdmin,
	adminpb.Admin_RevokeJoinToken_FullMethodName:  pki.RoleAdmin,
	adminpb.Admin_IssueCertificate_FullMethodName: pki.RoleAdmin,
}

// IsAdmin admits the certificates of admins: it is for the TLS configuration of TLSServer.
func IsAdmin(p pki.Peer) error {
	if p.Kind != pki.KindAdmin {
		return fmt.Errorf("%s is not an admin: %w", p, pki.ErrRefused)
	}
	return nil
}

// authorise returns nil where the caller may use a method. Who may open the Unix socket may use all of them.
func authorise(ctx context.Context, method string) error {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return status.Error(codes.Unauthenticated, "nothing is known of the caller")
	}
	switch info := p.AuthInfo.(type) {
	case callerInfo:
		return nil
	case credentials.TLSInfo:
		who, err := pki.PeerIn(info.State)
		if err != nil {
			return status.Error(codes.Unauthenticated, err.Error())
		}
		need, known := access[method]
		if !known {
			need = pki.RoleAdmin
		}
		if !known || who.Kind != pki.KindAdmin || !who.Has(need) {
			return status.Errorf(codes.PermissionDenied, "%s may not; it takes the role %s: have a certificate made with `ballastctl cluster admin-cert NAME --role %s`", who, need, need)
		}
		return nil
	}
	return status.Error(codes.Unauthenticated, "the caller has no certificate")
}

// TLSServer returns a gRPC server with the service on it for admins elsewhere. c verifies callers with IsAdmin.
func (s *Service) TLSServer(c *tls.Config) *grpc.Server {
	return s.server(credentials.NewTLS(c))
}

// tlsCaller names who called over TLS; "" for another caller.
func tlsCaller(p *peer.Peer) string {
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return ""
	}
	who, err := pki.PeerIn(info.State)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(fmt.Sprintf("%s from %s", who, p.Addr))
}
