//go:build race

package extentstore

// raced: the race detector makes everything several times slower. What a seed or a step finds it finds without it, so that
// fewer are enough: those that go on at once are all there.
const raced = true
