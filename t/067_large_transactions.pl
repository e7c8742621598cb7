# Transactions that count a great many keys: they take them in the same order
# whatever the session has done before.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_node('large', 'statbuffer.max_workers = 4');

# --- the order ----------------------------------------------------------------

# From 10,000 keys on, keys are taken in the order of their hashes.  That can be
# seen by which of several keys is refused when none has room for what is added.
# It is the same one in whatever order they were counted, also in the first
# transaction of a session, whose process knows nothing of the shared memory yet.
my @full = map { "full $_" } 1 .. 5;

make_buffer($node, $db, 'ordered', q{interval '1h', timeout '1h'});
sql(join ';', map { "SELECT sb_increment('$full[$_]', 2000000000000000001 + $_, 'ordered')" } 0 .. $#full);
sub refused
{
	my ($before, @keys) = @_;
	my $error = error_of(join(';', $before, 'BEGIN', q{INSERT INTO ordered SELECT 'x' || g FROM generate_series(1, 10000) g},
			(map { "SELECT sb_increment('$_', 1000000000000000000, 'ordered')" } @keys), 'COMMIT'));

	like($error, qr/count is too large/, 'a key has no room');
	return $error =~ /The key has (\d+) counted/ ? $1 : $error;
}
my $first = refused('SELECT', @full);
is(refused('SELECT', reverse @full), $first, 'the first transaction of a session takes keys in the order of their hashes');
is(refused(q{SELECT sb_increment('before', 1, 'ordered')}, reverse @full), $first, 'and so do later ones');
is(sql(q{SELECT count(*) FROM ordered}), 6, 'none of them has counted anything');

has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
