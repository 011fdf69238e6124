//go:build !race

package extentstore

const raced = false
