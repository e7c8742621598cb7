# A standby is read-only for counts, too, and counts when it is promoted.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';

my $primary = PostgreSQL::Test::Cluster->new('primary');
$primary->init(allows_streaming => 1);
$primary->append_conf('postgresql.conf', qq{
shared_preload_libraries = 'statbuffer'
max_worker_processes = 16
log_line_prefix = '%m [%p] %b %q%a '
});
$primary->start;
$primary->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'backup', has_streaming => 1);
$standby->start;

# One buffer flushes, another one holds a count all the time.
$primary->safe_psql($db, 'CREATE EXTENSION statbuffer');
make_buffer($primary, $db, 'hits', q{interval '50ms'});
make_buffer($primary, $db, 'held', q{interval '1h'});
increment($primary, $db, 'hits', 'k', 3);
increment($primary, $db, 'held', 'k', 4);
wait_for_stored($primary, $db, 'hits', 3, 'the primary flushes');
$primary->wait_for_catchup($standby);

# --- the standby ------------------------------------------------------------

# What was stored is replicated; what is held is in the primary's memory.
is(stored($standby, $db, 'hits'), '3', 'standby: what the primary stored is there');
is($standby->safe_psql($db, q{SELECT sb_count('k', 'held') IS NULL}), 't', 'standby: what it holds is not');
is($standby->safe_psql($db, 'SELECT count(*) FROM held'), '0', 'standby: nor for SELECT');
is($standby->safe_psql($db, 'SELECT count(*), sum(keys) FROM sb_stat_buffers'), '2|0', 'standby: nor in the view');

for my $case (
	[ 'sb_increment()', q{SELECT sb_increment('k', 1, 'hits')} ],
	[ 'sb_async_increment()', q{SELECT sb_async_increment('k', 1, 'hits')} ],
	[ 'INSERT', q{INSERT INTO hits VALUES ('k', 1)} ])
{
	my ($what, $query) = @$case;
	my ($result, $stdout, $stderr) = $standby->psql($db, "\\set VERBOSITY verbose\n$query");

	isnt($result, 0, "standby: $what fails");
	like($stderr, qr/ERROR:  25006: /, "standby: $what is an error of a read-only transaction");
}
for my $function (qw(sb_increment sb_async_increment))
{
	my ($result, $stdout, $stderr) = $standby->psql($db, "SELECT $function('k', 1, 'hits')");

	like($stderr, qr/ERROR:  .*(recovery|standby).*\nHINT:  /, "standby: $function() says why, and hints at what to do");
}
for my $function (qw(sb_start sb_stop sb_flush_all sb_drain))
{
	my ($result, $stdout, $stderr) = $standby->psql($db, "SELECT $function('hits')");

	like($stderr, qr/ERROR:  .*recovery/, "standby: $function() fails");
}
is($standby->safe_psql($db, q{SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'statbuffer%'}),
	'0', 'standby: there is no process for what it cannot do');
is($standby->safe_psql($db, q{SELECT sb_count('k', 'hits') IS NULL}), 't', 'standby: nothing was counted');

# --- promoted ---------------------------------------------------------------

# A session that has tried before, goes on.
my $session = $standby->background_psql($db, on_error_stop => 0);
$session->query(q{SELECT sb_increment('k', 1, 'hits')});
$standby->promote;
wait_for($standby, $db, 'SELECT NOT pg_is_in_recovery()', 'promoted');
wait_for($standby, $db, q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'statbuffer launcher'},
	'promoted: the launcher starts');

increment($standby, $db, 'hits', 'k', 10);
$session->query(q{SELECT sb_increment('k', 100, 'hits')});
$session->quit;
wait_for_stored($standby, $db, 'hits', 113, 'promoted: its increments are flushed');
increment($standby, $db, 'held', 'k', 40);
is($standby->safe_psql($db, q{SELECT sb_count('k', 'held')}), '40', 'promoted: its counts are its own');
is($standby->safe_psql($db, q{SELECT sb_drain('held')}), 't', 'promoted: drained');
is(stored($standby, $db, 'held'), '40', 'promoted: stored');

# The other one did not notice.
is($primary->safe_psql($db, q{SELECT sb_drain('held')}), 't', 'the former primary goes on');
is(stored($primary, $db, 'held'), '4', 'and has stored its own');

$standby->stop;
$primary->stop;
done_testing();
