# doc/monitoring/watch.sql, the query for a person who watches: it fits into 120
# columns however long the names and large the numbers are, tells how fast
# buffers are counted in since the last look, and does it again and again.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $file = "$FindBin::RealBin/../doc/monitoring/watch.sql";
my $once = slurp_file($file);
ok($once =~ s/^\\watch 2\n\z/;/m, 'it ends with \watch');

my $node = new_node('main');
my $long_name = join '', map { chr(ord('a') + $_ % 26) } 1 .. 63;
make_buffer($node, $db, 'failing', q{interval '1h', timeout '1h', backoff '1h'});
make_buffer($node, $db, 'late', q{interval '0', timeout '1h', batch_size '1'});
$node->safe_psql($db, qq{
	CREATE SCHEMA "$long_name";
	CREATE FOREIGN TABLE "$long_name"."$long_name" (key text, count bigint)
	SERVER statbuffer OPTIONS (handler 'failing_store', interval '24d', timeout '24d');
	CREATE ROLE watcher LOGIN;
	GRANT pg_monitor TO watcher;
});

# look(SQL...): the rows that the query shows, each time that it runs in a
# session; between these it does what is said.
sub look
{
	my @between = @_;
	my $session = join '', map { "$once\n$_;\n" } @between, '';
	my $out = $node->safe_psql($db, $session, extra_params => [ '-U', 'watcher', '-P', 'format=aligned', '-P', 'tuples_only=off' ]);
	my (@looks, @columns, $last_row);

	foreach my $line (split /\n/, $out)
	{
		cmp_ok(length($line), '<=', 120, "fits: $line");
		next if $line =~ /^[-+]+$/ || $line !~ /\|/;
		my @fields = map { s/^\s+|\s+$//gr } split /\|/, $line, -1;
		if ($fields[0] eq 'buffer')
		{
			@columns = @fields;
			push @looks, {};
			next;
		}
		my %row;
		@row{@columns} = @fields;

		# the last column goes on in the next line
		if ($row{buffer} eq '')
		{
			$last_row->{failures} .= $row{failures} =~ s/\+$//r;
			next;
		}
		$row{failures} =~ s/\+$//;
		$looks[-1]{ $row{buffer} } = $last_row = \%row;
	}
	return @looks;
}

# --- nothing counted yet ----------------------------------------------------

my ($first) = look();
is($first->{failing}{state}, 'idle', 'a buffer that nobody has used yet');
is($first->{failing}{keys}, 0, 'has no keys');
is($first->{failing}{due_in}, '', 'nothing is due');

# --- a lot ------------------------------------------------------------------

increment($node, $db, qq{"$long_name"."$long_name"}, 'k', '-2305843009213693952');
$node->safe_psql($db, q{INSERT INTO failing_bad VALUES ('bad')});
increment($node, $db, 'failing', 'bad', 3);
$node->safe_psql($db, q{SELECT sb_flush_all('failing')});
wait_for($node, $db, q{
	SELECT state = 'failing' AND in_flight = 0 FROM sb_stat_buffers WHERE buffer = 'failing'},
	'a buffer fails');
my $gate = close_gate($node, $db);
increment($node, $db, 'late', 'a', 1);
wait_for($node, $db, q{SELECT in_flight = 1 FROM sb_stat_buffers WHERE buffer = 'late'}, 'a handler is slow');
increment($node, $db, 'late', 'b', 2);
wait_for($node, $db, q{SELECT oldest_due < clock_timestamp() FROM sb_stat_buffers WHERE buffer = 'late'},
	'a key is late');
$node->safe_psql($db, 'GRANT INSERT ON failing TO watcher');

my @looks = look(q{SELECT count(*) FROM (SELECT sb_increment(i % 5, 1, 'failing') FROM generate_series(1, 1000) i) s},
	q{SELECT pg_sleep(0.1)});
is(scalar(@looks), 3, 'it can be run again');
my ($before, $after, $at_rest) = @looks;
is(scalar(keys %$after), 3, 'every buffer is shown');

my ($clipped) = grep { /^"?abc|^"?bcd/ } keys %$after;
is($after->{$clipped}{count}, '-2305843009213693952', 'the largest count is shown');
cmp_ok($after->{$clipped}{due_in}, '>', 100_000, 'so is what is due long hence');
is($after->{failing}{state}, 'failing', 'what fails');
like($after->{failing}{failures}, qr/^\d+:\s*bad key bad$/, 'how often, and why');
is($after->{late}{failures}, 0, 'what does not fail has no reason');
is($after->{failing}{count}, 1003, 'what is not stored yet');
cmp_ok($after->{late}{due_in}, '<=', 0, 'what is late');
is($after->{late}{count}, 3, 'and what is being stored');
cmp_ok($after->{failing}{per_s}, '>', 0, 'how fast it grew since the last look');
is($at_rest->{failing}{per_s}, 0, 'and that it grows no more');
is($at_rest->{late}{per_s}, 0, 'which is not what was counted since the beginning');
cmp_ok($before->{late}{per_s}, '>=', 0, 'as it is at the first look');

# Statistics that are reset in between are not a negative rate.
my (undef, $reset) = look(q{RESET ALL; SELECT 1});
cmp_ok($reset->{failing}{per_s}, '>=', 0, 'what the session remembers may be lost');
open_gate($gate);

# --- as it is ---------------------------------------------------------------

# With \watch, it shows all again and again, until psql is ended.
my ($out, $err) = ('', '');
my $watching = IPC::Run::start(
	[ 'psql', '-X', '-U', 'watcher', '-d', $node->connstr($db), '-f', $file ],
	'<', \undef, '>', \$out, '2>', \$err, IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));
$watching->pump until ($out =~ s/^ *buffer +\|/$&/mg) >= 2 || $err ne '';
$watching->kill_kill;
is($err, '', 'no errors');
is(scalar(() = $out =~ /^ *failing +\|/mg) >= 2, 1, 'shown twice');

$node->stop;

done_testing();
