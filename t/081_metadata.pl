# What others read to know what this is: META.json has what the PGXN Meta Spec
# 1.0.0 demands, names files that there are, and all versions are one: that of
# statbuffer.control, in META.json and in Debian's changelog.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;

my $top = "$FindBin::RealBin/..";
my ($version) = slurp_file("$top/statbuffer.control") =~ /^default_version = '(.*)'$/m;
ok($version, 'statbuffer.control has a version');
ok(-f "$top/statbuffer--$version.sql", 'there is a script for it');

# --- META.json --------------------------------------------------------------

my $meta = eval { JSON::PP->new->utf8->decode(slurp_file("$top/META.json")) };
is($@, '', 'META.json is JSON');

# The spec's terms: a string that is not empty, a semantic version.
my $is_string = sub { defined $_[0] && !ref $_[0] && $_[0] =~ /\S/ };
my $is_version = sub { $is_string->($_[0]) && $_[0] =~ /^(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}([a-zA-Z][-0-9A-Za-z]*)?$/ };
my $is_term = sub { $is_string->($_[0]) && length($_[0]) >= 2 && $_[0] !~ m{[\s/\\[:cntrl:]]} };
my $is_maintainer = sub {
	my @names = ref $_[0] ? @{ $_[0] } : $_[0];
	@names && !grep { !$is_string->($_) } @names;
};
my %licenses = map { $_ => 1 } qw(agpl_3 apache_1_1 apache_2_0 artistic_1 artistic_2 bsd freebsd gfdl_1_2 gfdl_1_3 gpl_1
  gpl_2 gpl_3 lgpl_2_1 lgpl_3_0 mit mozilla_1_0 mozilla_1_1 openssl perl_5 postgresql qpl_1_0 ssleay sun zlib
  open_source restricted unrestricted unknown);

ok($is_term->($meta->{name}), 'name');
is($meta->{name}, 'statbuffer', 'which is ours');
ok($is_version->($meta->{version}), 'version');
ok($is_string->($meta->{abstract}), 'abstract');
ok($is_string->($meta->{description}), 'description');
ok($is_maintainer->($meta->{maintainer}), 'maintainer');
ok($licenses{ $meta->{license} }, 'license');
like($meta->{release_status}, qr/^(stable|testing|unstable)$/, 'release_status');
ok($is_version->($meta->{'meta-spec'}{version}), 'version of the spec');
is($meta->{'meta-spec'}{version}, '1.0.0', 'which is the one that is checked here');
like($meta->{'meta-spec'}{url}, qr{^https?://}, 'where that is');
is_deeply([ grep { !$is_string->($_) || length > 255 || m{[/\\[:cntrl:]]} } @{ $meta->{tags} } ], [], 'tags');
is_deeply([ grep { !/^(abstract|description|generated_by|license|maintainer|meta-spec|name|no_index|prereqs|provides|release_status|resources|tags|version|x_.*)$/i }
	keys %$meta ], [], 'no fields that the spec does not know');

is_deeply([ keys %{ $meta->{provides} } ], ['statbuffer'], 'what it provides');
foreach my $provided (values %{ $meta->{provides} })
{
	ok($is_string->($provided->{abstract}), 'its abstract');
	ok($is_version->($provided->{version}), 'its version');
	ok(-f "$top/$provided->{file}", 'its file');
	is($provided->{file}, "statbuffer--$version.sql", 'which is the script of this version');
	ok(-f "$top/$provided->{docfile}", 'its documentation');
	is($provided->{version}, $meta->{version}, 'they have one version');
}
foreach my $phase (keys %{ $meta->{prereqs} })
{
	like($phase, qr/^(configure|build|test|runtime|develop)$/, 'a phase of prerequisites');
	foreach my $relation (keys %{ $meta->{prereqs}{$phase} })
	{
		like($relation, qr/^(requires|recommends|suggests|conflicts)$/, 'a relation');
		is_deeply([ grep { !$is_version->($_) && $_ ne '0' } values %{ $meta->{prereqs}{$phase}{$relation} } ], [], 'to versions');
	}
}
is($meta->{version}, "$version.0", 'the version is that of the control file, in the form of the spec');

# --- the others -------------------------------------------------------------

like(slurp_file("$top/CHANGELOG.md"), qr/^## \Q$version\E( |$)/m, 'the changelog has the version');

SKIP:
{
	skip 'this is the archive of a release, without debian/', 3 if !-d "$top/debian";

	like(slurp_file("$top/debian/changelog"), qr/\Astatbuffer \(\Q$version\E-/, 'so has that of the package');
	my ($licence) = slurp_file("$top/debian/copyright") =~ /^License: PostgreSQL\n(.*)\z/ms;
	my ($original) = slurp_file("$top/LICENSE") =~ /^(Permission .*)\z/ms;
	is($licence =~ s/^ \.?//mgr, $original, 'and the licence is the same');
	is(slurp_file("$top/debian/control"), slurp_file("$top/debian/control.in") =~ s/PGVERSION/15/gr,
		'debian/control is made of its template');
}

done_testing();
