package admin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/ballast-csi/ballast/pkg/admin/adminpb"
	"github.com/ballast-csi/ballast/pkg/pki"
)

// methods are all that the service has.
func methods() []string {
	var out []string
	d := adminpb.Admin_ServiceDesc
	for _, m := range d.Methods {
		out = append(out, "/"+d.ServiceName+"/"+m.MethodName)
	}
	for _, m := range d.Streams {
		out = append(out, "/"+d.ServiceName+"/"+m.StreamName)
	}
	return out
}

// calledBy is the context of a call over TLS by an identity.
func calledBy(t *testing.T, ca *pki.CA, id pki.Identity) context.Context {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := key.Request()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := ca.Issue(csr, id, 0, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(chain)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return callOf(credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}})
}

func callOf(info credentials.AuthInfo) context.Context {
	return peer.NewContext(context.Background(), &peer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}, AuthInfo: info})
}

// What each role may do is written down here a second time, on purpose.
var operators = strings.Fields(`CreateVolume DeleteVolume ExpandVolume SetVolume DetachVolume CreateSnapshot DeleteSnapshot CreateGroup DeleteGroup
	SetQuota DeleteQuota DrainNode UndrainNode`)

var admins = strings.Fields(`Export EmptyNode RemoveNode ForgetPool SalvageVolume RemoveController CreateJoinToken RevokeJoinToken IssueCertificate`)

func TestWhoMayDoWhat(t *testing.T) {
	ca, err := pki.NewCA("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	callers := []struct {
		name string
		ctx  context.Context
		may  func(method string) bool
		code codes.Code
	}{
		{"viewer", calledBy(t, ca, pki.Admin("v", pki.RoleViewer)), func(m string) bool { return !slices.Contains(operators, m) && !slices.Contains(admins, m) }, codes.PermissionDenied},
		{"operator", calledBy(t, ca, pki.Admin("o", pki.RoleOperator)), func(m string) bool { return !slices.Contains(admins, m) }, codes.PermissionDenied},
		{"admin", calledBy(t, ca, pki.Admin("a", pki.RoleAdmin)), func(string) bool { return true }, codes.OK},
		{"node", calledBy(t, ca, pki.Node("n", pki.RoleController)), func(string) bool { return false }, codes.PermissionDenied},
		{"socket", callOf(callerInfo{}), func(string) bool { return true }, codes.OK},
		{"no certificate", callOf(credentials.TLSInfo{}), func(string) bool { return false }, codes.Unauthenticated},
		{"plain text", callOf(nil), func(string) bool { return false }, codes.Unauthenticated},
		{"nobody", context.Background(), func(string) bool { return false }, codes.Unauthenticated},
	}
	all := methods()
	for _, m := range all {
		if _, ok := access[m]; !ok {
			t.Errorf("%s is in no role", m)
		}
		short := m[strings.LastIndexByte(m, '/')+1:]
		for _, c := range callers {
			err := authorise(c.ctx, m)
			if (err == nil) != c.may(short) || err != nil && status.Code(err) != c.code {
				t.Errorf("%s: %s: %v", c.name, short, err)
			}
		}
	}
	if len(access) != len(all) {
		t.Errorf("%d methods have a role, there are %d", len(access), len(all))
	}
	if err := authorise(callers[2].ctx, "/ballast.admin.v1.Admin/Unheard"); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a method without a role: %v", err)
	}
	if who := caller(callers[1].ctx); who != `admin "o" (operator) from 192.0.2.1:1` {
		t.Errorf("the audit log would say %q", who)
	}
	if err := IsAdmin(pki.Peer{Identity: pki.Node("n", pki.RoleController)}); err == nil {
		t.Error("a node is an admin")
	}
}
